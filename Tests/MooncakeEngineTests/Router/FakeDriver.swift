import MooncakeEngine
import MooncakeSystem

/// Moves the stream paths' slices when it is kicked, and only then: a router that forgets to kick
/// it is found out.
final class FakeDriver: Driver, @unchecked Sendable {
  // Unchecked: a simulation has one thread.
  static let isExclusive = true

  private unowned let network: FakeNetwork
  private(set) var bit = 0
  private var ready: [FakeStreamPath] = []
  private var isKicked = false
  private var nextSweep = UInt64.max
  var paths: [FakeStreamPath] = []

  init(_ network: FakeNetwork) {
    self.network = network
    bit = network.router.drivers.add(self) ?? 0
  }

  /// Lets go of its paths, which know it as well.
  func end() {
    paths = []
    ready = []
  }

  /// A path has something to do once the driver is kicked or driven.
  func schedule(_ path: FakeStreamPath) {
    if !ready.contains(where: { $0 === path }) { ready.append(path) }
  }

  func kick() { runSoon(0) }
  func nudge() { runSoon(UInt64(network.draw(below: 1_000_000))) }

  private func runSoon(_ nanoseconds: UInt64) {
    if isKicked && nanoseconds > 0 { return }
    isKicked = true
    network.time.after(nanoseconds) { [self] in _ = turn() }
  }

  func requestSweep() { network.time.after(0) { [self] in sweep() } }

  func pollIfFree() -> Bool {
    // Another thread drives: it sees what is queued.
    if network.chance(30) {
      runSoon(0)
      return false
    }
    return turn()
  }

  func driveIfFree(until deadline: Deadline, isDone: () -> Bool) -> Bool { false }

  private func turn() -> Bool {
    isKicked = false
    let now = ready
    ready = []
    for path in now { path.progress() }
    return !now.isEmpty
  }

  // MARK: Deadlines and cancellation

  /// A slice has come that must be looked at by its deadline.
  func watch(_ slice: SlicePointer) {
    let due = slice.pointee.batch.isCancelRequested ? 0 : slice.pointee.deadline
    if due >= nextSweep { return }
    nextSweep = due
    network.time.at(due) { [self] in sweep() }
  }

  private func sweep() {
    nextSweep = .max
    for path in paths { path.sweep() }
    let next = paths.reduce(UInt64.max) { min($0, $1.earliestDeadline) }
    if next < nextSweep {
      nextSweep = next
      network.time.at(next) { [self] in sweep() }
    }
  }
}
