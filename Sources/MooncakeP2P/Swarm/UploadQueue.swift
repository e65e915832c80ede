/// Receivers that wait for a place at a holder. They come again by themselves, so it only knows
/// when each came first and when it was heard last.
struct UploadQueue: Sendable {
  private struct Waiter {
    var reader: UInt64
    var since: UInt64
    /// Without another word until then it waits no longer.
    var expiry: UInt64
  }

  private let limit: Int
  private var waiters: [Waiter] = []

  init(limit: Int) { self.limit = limit }

  /// One was refused and told when to come again. Beyond the limit it is not remembered.
  mutating func add(_ reader: UInt64, retryMilliseconds: UInt64, now: UInt64) {
    // What it is told is the least that it waits.
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

  /// Whether a place that is free may be this one's: anybody's who comes, until somebody has
  /// waited for long. Then those go first who have waited at least half as long as that one; to
  /// keep it for that one alone would leave it unused until that one comes.
  func isDue(_ reader: UInt64, now: UInt64) -> Bool {
    let longest = waiters.reduce(0) { max($0, now &- $1.since) }
    if longest < Self.longNanoseconds { return true }
    guard let own = waiters.first(where: { $0.reader == reader }) else { return false }
    return (now &- own.since) >= longest / 2
  }

  private static let longNanoseconds: UInt64 = 10_000_000_000
  private static let patienceMilliseconds: UInt64 = 1000
}
