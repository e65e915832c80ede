/// Decides when a lease is granted, renewed and given up, and how long to pause after a failure.
///
/// It has no clock and calls nobody: its owner makes the calls, tells it what came of them, and
/// passes the time, in nanoseconds on a clock of its own. The time that counts for a lease is when
/// the service was asked, because the answer may be late.
///
/// It also works for services without leases: there, a renewal only checks that the entries exist.
package struct LeaseKeeper: Sendable {
  /// How long deleting everything may take in the end.
  package static let removalMilliseconds: UInt64 = 2000
  private static let shortestCallMilliseconds: UInt64 = 1000

  /// The lease for all entries; nil if the next one to be put needs a new one.
  package private(set) var lease: MetadataLease?
  /// When the owner's next round should begin, unless it has news before.
  package private(set) var next: UInt64
  private let requestedMilliseconds: UInt64
  /// When the service was asked for the last renewal, or for the lease.
  private var renewed: UInt64
  private var backoff = Backoff()

  /// `ttlMilliseconds` is what will be requested. The first round is due after a period.
  package init(ttlMilliseconds: UInt64, at now: UInt64) {
    requestedMilliseconds = ttlMilliseconds
    renewed = now
    next = 0
    begin(at: now)
  }

  /// Starts counting from now, if rounds begin later than `init`.
  package mutating func begin(at now: UInt64) {
    renewed = max(renewed, now)
    next = renewed &+ periodNanoseconds
  }

  /// What was requested, or less if the service grants less. If it grants more, a loss is still
  /// noticed as soon as requested.
  private var ttlMilliseconds: UInt64 {
    min(requestedMilliseconds, lease?.ttlMilliseconds ?? .max)
  }

  /// Between renewals. A third leaves time for one that fails and another.
  private var periodNanoseconds: UInt64 { ttlMilliseconds * 1_000_000 / 3 }

  /// How long the calls of a round may take.
  package var callMilliseconds: UInt64 {
    max(Self.shortestCallMilliseconds, ttlMilliseconds * 3 / 10)
  }

  /// How long the owner may spend on deleting everything in the end: less if the service did not
  /// answer the last time.
  package var endMilliseconds: UInt64 { Self.removalMilliseconds / (isDown ? 4 : 1) }

  /// Whether the last round failed.
  package var isDown: Bool { backoff.isFailing }

  /// Whether the lease must be renewed before anything else is done.
  package func isDue(at now: UInt64) -> Bool { now >= renewed &+ periodNanoseconds }

  // MARK: The lease

  /// Takes a lease that was requested at a time, and returns the one to use. If several threads
  /// requested one, that is the first; the others expire unused.
  @discardableResult
  package mutating func granted(_ new: MetadataLease?, at asked: UInt64) -> MetadataLease? {
    if lease == nil {
      lease = new
      renewed = max(renewed, asked)
    }
    return lease
  }

  /// The service has renewed the lease, as requested at a time, or there was nothing to renew. An
  /// answer about a lease that has been replaced meanwhile does not count.
  package mutating func renewed(_ lease: MetadataLease?, at asked: UInt64) {
    if lease == self.lease { renewed = max(renewed, asked) }
  }

  /// That lease has ended, or nothing depends on it any more. Returns false if it has been replaced
  /// meanwhile.
  @discardableResult
  package mutating func forget(_ lease: MetadataLease?) -> Bool {
    guard lease == self.lease else { return false }
    self.lease = nil
    return true
  }

  // MARK: Rounds

  /// A round has ended well, and the next is due with the renewal, or soon if this one left work.
  /// Returns whether the one before failed.
  package mutating func succeeded(at now: UInt64, isFinished: Bool = true) -> Bool {
    let wasDown = isDown
    backoff.succeeded()
    // Even if the calls take as long as a period, there is a pause between rounds.
    let soon = now &+ min(Backoff.firstMilliseconds * 1_000_000, periodNanoseconds)
    next = isFinished ? max(soon, renewed &+ periodNanoseconds) : soon
    return wasDown
  }

  /// A round has failed, and the next comes after a pause; if the service refused what it was told
  /// and will do so again, not before the lease is due. Returns whether the round before succeeded.
  package mutating func failed(at now: UInt64, isRefused: Bool = false) -> Bool {
    let wasDown = isDown
    backoff.failed()
    next = now &+ backoff.milliseconds * 1_000_000
    if isRefused { next = max(next, renewed &+ periodNanoseconds) }
    return !wasDown
  }
}
