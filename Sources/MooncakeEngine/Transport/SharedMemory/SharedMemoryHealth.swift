import MooncakeSystem
import Synchronization

/// Why the memory of a segment's peer is not used, and when it is tried again.
///
/// A queue of connections that is full, or a process that is out of descriptors, passes; the peer
/// must not be reached over TCP for the rest of its life because of it.
package final class SharedMemoryHealth: Sendable {
  private struct State: Sendable {
    var restNanoseconds = SharedMemoryHealth.firstRestNanoseconds
    var failure: String?
  }
  private let state = Lock(State())
  /// When the next attempt is due, on `Clock`, or one of the words below.
  private let nextAttempt = Atomic<UInt64>(SharedMemoryHealth.never)

  /// The peer cannot be reached so, or an attempt is running.
  private static let never = UInt64.max
  /// The peer is in use.
  private static let settled = UInt64.max - 1

  private static let firstRestNanoseconds: UInt64 = 5_000_000
  private static let longestRestNanoseconds: UInt64 = 5_000_000_000

  package init() {}

  /// Why the peer is not reached so; nil if it is, or is not on this host.
  package var failure: String? { state.withLock { $0.failure } }

  /// Whether an attempt is due for a peer that is not usable; a loss not noticed yet makes it due
  /// after a rest.
  @inline(__always)
  package var isDue: Bool {
    let next = nextAttempt.load(ordering: .relaxed)
    return next != Self.never && isDue(next)
  }

  private func isDue(_ next: UInt64) -> Bool {
    let now = Clock.now()
    if next != Self.settled { return next <= now }
    _ = nextAttempt.compareExchange(
      expected: next, desired: now &+ Self.firstRestNanoseconds, ordering: .relaxed)
    return false
  }

  /// Takes on the attempt that is due; false if another thread has.
  package func beginAttempt() -> Bool {
    let next = nextAttempt.load(ordering: .relaxed)
    guard next != Self.never, next != Self.settled, next <= Clock.now() else { return false }
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
    nextAttempt.store(Self.settled, ordering: .relaxed)
    return hadFailed
  }

  /// Notes a failure that another attempt may not meet; returns whether it is another than before.
  package func noteFailure(_ failure: String, isFinal: Bool) -> Bool {
    let (isNew, rest) = state.withLock { state in
      defer {
        state.failure = failure
        state.restNanoseconds = min(2 * state.restNanoseconds, Self.longestRestNanoseconds)
      }
      return (state.failure != failure, state.restNanoseconds)
    }
    nextAttempt.store(isFinal ? Self.never : Clock.now() &+ rest, ordering: .relaxed)
    return isNew
  }
}
