import MooncakeSystem
import Synchronization

/// Why the memory of a segment's peer is not used, and when it is tried again.
///
/// A full queue of connections or a process without free descriptors is a passing failure: it must
/// not bind the peer to TCP for the rest of its life.
package final class SharedMemoryHealth: Sendable {
  private struct State: Sendable {
    var restNanoseconds = SharedMemoryHealth.firstRestNanoseconds
    var failure: String?
  }
  private let state = Lock(State())
  /// When the next attempt is due, on `Clock`, or one of the words below.
  private let nextAttempt = Atomic<UInt64>(SharedMemoryHealth.never)

  /// The peer has no shared memory, or an attempt is running.
  private static let never = UInt64.max
  /// The peer's memory is in use.
  private static let inUse = UInt64.max - 1

  private static let firstRestNanoseconds: UInt64 = 5_000_000
  private static let restLimitNanoseconds: UInt64 = 5_000_000_000

  package init() {}

  /// Why the peer's memory is not used; nil if it is, or if the peer is not on this host.
  package var failure: String? { state.withLock { $0.failure } }

  /// Whether an attempt is due for a peer that is not usable. If its loss was not noted yet, the
  /// attempt becomes due after a rest.
  @inline(__always)
  package var isDue: Bool {
    let next = nextAttempt.load(ordering: .relaxed)
    return next != Self.never && isDue(next)
  }

  private func isDue(_ next: UInt64) -> Bool {
    let now = Clock.now()
    if next != Self.inUse { return next <= now }
    _ = nextAttempt.compareExchange(
      expected: next, desired: now &+ Self.firstRestNanoseconds, ordering: .relaxed)
    return false
  }

  /// Claims the attempt that is due; false if another thread has claimed it.
  package func beginAttempt() -> Bool {
    let next = nextAttempt.load(ordering: .relaxed)
    guard next != Self.never, next != Self.inUse, next <= Clock.now() else { return false }
    return nextAttempt.compareExchange(
      expected: next, desired: Self.never, ordering: .relaxed
    ).exchanged
  }

  /// The peer is in use now; returns whether it was not because of a failure.
  func noteSuccess() -> Bool {
    let hadFailed = state.withLock { state in
      defer { state = State() }
      return state.failure != nil
    }
    nextAttempt.store(Self.inUse, ordering: .relaxed)
    return hadFailed
  }

  /// Notes a failure, which a later attempt may not meet unless it is final; returns whether it
  /// differs from the last one.
  package func noteFailure(_ failure: String, isFinal: Bool) -> Bool {
    let (isNew, rest) = state.withLock { state in
      defer {
        state.failure = failure
        state.restNanoseconds = min(2 * state.restNanoseconds, Self.restLimitNanoseconds)
      }
      return (state.failure != failure, state.restNanoseconds)
    }
    nextAttempt.store(isFinal ? Self.never : Clock.now() &+ rest, ordering: .relaxed)
    return isNew
  }
}
