import MooncakeSystem
import Synchronization

/// Lets a fixed number of threads pass a point together, any number of times.
final class PhaseBarrier: Sendable {
  private let count: Int
  private let arrived = Mutex(0)
  private let phase = Futex()

  init(count: Int) { self.count = count }

  /// Waits for all threads. The last to arrive runs `whenAllAreHere` before any continues.
  func wait(_ whenAllAreHere: () -> Void) {
    let current = phase.value
    let isLast = arrived.withLock { arrived in
      arrived += 1
      if arrived < count { return false }
      arrived = 0
      return true
    }
    if isLast {
      whenAllAreHere()
      phase.increment()
      phase.wakeAll()
      return
    }
    while phase.value == current { phase.wait(while: current, until: .never) }
  }
}
