import MooncakeSystem
import Synchronization

/// Why a path is not used, and when it is tried again.
///
/// A full queue of connections or a process without free descriptors is a passing failure: it must
/// not keep a path out of use for the rest of its life. So a failing path rests, longer after each
/// failure in a row, and comes back by itself.
package final class PathHealth: Sendable {
  private struct State: Sendable {
    var restNanoseconds = PathHealth.firstRestNanoseconds
    var failure: String?
    var failureCount: UInt64 = 0
  }
  private let state = Lock(State())
  /// When the next attempt is due, on `Clock`, or one of the words below.
  private let nextAttempt: Atomic<UInt64>

  /// No attempt is to be made, or one is running.
  private static let never = UInt64.max
  /// The path is in use.
  private static let inUse = UInt64.max - 1

  package static let firstRestNanoseconds: UInt64 = 5_000_000
  package static let restLimitNanoseconds: UInt64 = 500_000_000

  /// A path that is not tried before `noteFailure`, unless it is in use from the start.
  package init(isInUse: Bool = false) { nextAttempt = Atomic(isInUse ? Self.inUse : Self.never) }

  /// Why the path is not used; nil if it is.
  package var failure: String? { state.withLock { $0.failure } }

  /// Failures since the path was made.
  package var failureCount: UInt64 { state.withLock { $0.failureCount } }

  /// Whether the path works, as far as is known.
  @inline(__always)
  package var isInUse: Bool { nextAttempt.load(ordering: .relaxed) == Self.inUse }

  /// Whether an attempt is due for a path that is not usable. If its loss was not noted yet, the
  /// attempt becomes due after a rest.
  @inline(__always)
  package func isDue(_ now: UInt64 = Clock.now()) -> Bool {
    let next = nextAttempt.load(ordering: .relaxed)
    if next == Self.never { return false }
    if next != Self.inUse { return next <= now }
    _ = nextAttempt.compareExchange(
      expected: next, desired: now &+ Self.firstRestNanoseconds, ordering: .relaxed)
    return false
  }

  /// Claims the attempt that is due for as long as one may take; false if none is, or another
  /// thread has claimed it.
  package func beginProbe(_ now: UInt64, until end: UInt64) -> Bool {
    let next = nextAttempt.load(ordering: .relaxed)
    guard next != Self.never, next != Self.inUse, next <= now else { return false }
    return nextAttempt.compareExchange(expected: next, desired: end, ordering: .relaxed).exchanged
  }

  /// Claims the attempt that is due; false if another thread has claimed it.
  package func beginAttempt(_ now: UInt64 = Clock.now()) -> Bool {
    let next = nextAttempt.load(ordering: .relaxed)
    guard next != Self.never, next != Self.inUse, next <= now else { return false }
    return nextAttempt.compareExchange(
      expected: next, desired: Self.never, ordering: .relaxed
    ).exchanged
  }

  /// The path is in use now; returns whether it was not because of a failure.
  @discardableResult
  package func noteSuccess() -> Bool {
    if isInUse { return false }
    return state.withLock { state in
      defer {
        state.failure = nil
        state.restNanoseconds = Self.firstRestNanoseconds
        nextAttempt.store(Self.inUse, ordering: .relaxed)
      }
      return state.failure != nil
    }
  }

  /// Notes a failure, which a later attempt may not meet unless it is final; returns whether it
  /// differs from the last one.
  @discardableResult
  package func noteFailure(
    _ failure: String, isFinal: Bool = false, _ now: UInt64 = Clock.now()
  ) -> Bool {
    state.withLock { state in
      defer {
        nextAttempt.store(
          isFinal ? Self.never : now &+ state.restNanoseconds, ordering: .relaxed)
        state.failure = failure
        state.failureCount += 1
        state.restNanoseconds = min(2 * state.restNanoseconds, Self.restLimitNanoseconds)
      }
      return state.failure != failure
    }
  }
}
