/// Receivers that wait for a place at a holder. They ask again by themselves, so the queue only
/// knows when each first came and until when it is expected again.
struct UploadQueue: Sendable {
  private struct Waiter {
    var reader: UInt64
    var since: UInt64
    /// If it has not asked again by then, it no longer waits.
    var expiry: UInt64
  }

  private let limit: Int
  private var waiters: [Waiter] = []

  init(limit: Int) { self.limit = limit }

  /// A receiver was refused and told when to ask again. Beyond the limit it is not remembered.
  mutating func add(_ reader: UInt64, retryMilliseconds: UInt64, now: UInt64) {
    // It waits at least as long as it was told.
    let expiry = now &+ (2 * retryMilliseconds + Self.patienceMilliseconds) * 1_000_000
    if let known = waiters.firstIndex(where: { $0.reader == reader }) {
      waiters[known].expiry = expiry
    } else if waiters.count < limit {
      waiters.append(Waiter(reader: reader, since: now, expiry: expiry))
    }
  }

  mutating func remove(_ reader: UInt64) { waiters.removeAll { $0.reader == reader } }

  mutating func dropExpired(_ now: UInt64) {
    if waiters.contains(where: { $0.expiry <= now }) {
      waiters.removeAll { $0.expiry <= now }
    }
  }

  var isEmpty: Bool { waiters.isEmpty }

  /// Whether a receiver may have a free place. Any may, until one has waited for long. Then only
  /// those that have waited at least half as long: keeping the place for that one alone would leave
  /// it unused until it asks again.
  func isDue(_ reader: UInt64, now: UInt64) -> Bool {
    let longest = waiters.reduce(0) { max($0, now &- $1.since) }
    if longest < Self.longNanoseconds { return true }
    guard let own = waiters.first(where: { $0.reader == reader }) else { return false }
    return (now &- own.since) >= longest / 2
  }

  private static let longNanoseconds: UInt64 = 10_000_000_000
  private static let patienceMilliseconds: UInt64 = 1000
}
