/// How many receivers a holder refuses in a second, and how long each of them must wait: asking
/// costs a holder the same however many want its shards.
struct RefusalRate: Sendable {
  private var second: UInt64 = 0
  private var count: UInt64 = 0
  /// In the second before.
  private var formerCount: UInt64 = 0

  private static let secondNanoseconds: UInt64 = 1_000_000_000

  /// Counts a refusal, unless nothing was asked for. Returns when to ask again, if `perSecond`
  /// receivers may ask in a second.
  mutating func retryMilliseconds(isRefusal: Bool, perSecond: UInt64, now: UInt64) -> UInt64 {
    let present = now / Self.secondNanoseconds
    if present != second {
      formerCount = present == second &+ 1 ? count : 0
      count = 0
      second = present
    }
    if isRefusal { count += 1 }
    return max(count, formerCount) * 1000 / perSecond
  }
}
