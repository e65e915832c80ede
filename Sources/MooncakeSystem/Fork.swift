import CLinux
import Glibc
import Synchronization

/// Lets the child of a fork start afresh with the library, whatever the parent's threads were
/// doing.
///
/// Process-wide state is of three kinds: words without locks; locks and tables that a fork handler
/// replaces in the child before `fork` returns there; and things whose locks cannot be replaced
/// (other libraries, the first use of a Swift global). The last are used only inside `excluded`,
/// which a fork waits for. Objects behind handles need none of this: the child cannot reach them.
package enum Fork {
  /// Lower half: threads inside `excluded`. Upper half: threads about to fork.
  private static let gate = Atomic<UInt32>(0)
  private static let insideMask: UInt32 = 0xFFFF
  private static let forking: UInt32 = 0x1_0000

  /// How long a fork waits at most: a thread inside may itself be waiting for something the forking
  /// thread holds, as when a library forks while being loaded.
  private static let patienceMilliseconds: UInt64 = 2000

  private static let forkCount = Atomic<UInt32>(1)
  private static let preparing = Atomic<UInt32>(LockWord.free)

  /// Differs between a child and its parent: whatever a thread has cached about itself is void once
  /// this has changed. Never 0.
  @inline(__always)
  package static var generation: UInt32 { forkCount.load(ordering: .relaxed) }

  /// Runs `body` while no thread forks. `body` must be short, must not wait or call back, and must
  /// not nest.
  package static func excluded<Result: ~Copyable, Failure: Error>(
    _ body: () throws(Failure) -> Result
  ) throws(Failure) -> Result {
    enter()
    defer { leave() }
    return try body()
  }

  /// Runs `body` once, before anything else needs the globals it touches; `flag` records that it
  /// ran. The first use of a Swift global takes a lock owned by its thread, which a forked child
  /// could neither release nor wait for.
  @inline(__always)
  package static func prepare(_ flag: borrowing Atomic<Bool>, _ body: () -> Void) {
    if !flag.load(ordering: .acquiring) { prepareNow(flag, body) }
  }

  @inline(never)
  private static func prepareNow(_ flag: borrowing Atomic<Bool>, _ body: () -> Void) {
    excluded {
      if !LockWord.tryTake(preparing) { LockWord.take(preparing) }
      if !flag.load(ordering: .relaxed) { body() }
      flag.store(true, ordering: .releasing)
      LockWord.release(preparing)
    }
  }

  /// Makes `body` run in every child before `fork` returns there. It must take no lock. Call this
  /// once per body, inside `excluded`.
  package static func inChild(_ body: @escaping @convention(c) () -> Void) {
    if pthread_atfork(nil, nil, body) != 0 { fatalError("no memory for a fork handler") }
  }

  private static func enter() {
    var word = gate.load(ordering: .relaxed)
    while true {
      if word >= forking {
        wait(while: word, until: .never)
        word = gate.load(ordering: .relaxed)
        continue
      }
      let (exchanged, current) = gate.compareExchange(
        expected: word, desired: word + 1, ordering: .acquiringAndReleasing)
      if exchanged { return }
      word = current
    }
  }

  private static func leave() {
    // 0 means this is the child and the parent forked from inside.
    var word = gate.load(ordering: .relaxed)
    while word & insideMask != 0 {
      let (exchanged, current) = gate.compareExchange(
        expected: word, desired: word - 1, ordering: .acquiringAndReleasing)
      if exchanged { break }
      word = current
    }
    if word >= forking { wakeAll() }
  }

  // MARK: Handlers

  // Installed at load time, before any call into the library. This needs nothing from the Swift
  // runtime.
  @used
  @section(".init_array")
  private nonisolated(unsafe) static let register: @convention(c) () -> Void = {
    pthread_atfork({ Fork.begin() }, { Fork.finishInParent() }, { Fork.finishInChild() })
  }

  private static func begin() {
    let error = errno
    let deadline = Deadline.after(milliseconds: patienceMilliseconds)
    var word = gate.wrappingAdd(forking, ordering: .sequentiallyConsistent).newValue
    while word & insideMask != 0, !deadline.hasPassed {
      wait(while: word, until: deadline)
      word = gate.load(ordering: .acquiring)
    }
    errno = error
  }

  private static func finishInParent() {
    let error = errno
    let word = gate.wrappingSubtract(forking, ordering: .acquiringAndReleasing).newValue
    if word < forking { wakeAll() }
    errno = error
  }

  private static func finishInChild() {
    gate.store(0, ordering: .relaxed)
    // A parent's thread may still be inside if the fork stopped waiting for it.
    preparing.store(LockWord.free, ordering: .relaxed)
    forkCount.wrappingAdd(1, ordering: .relaxed)
    if generation == 0 { forkCount.store(1, ordering: .relaxed) }
  }

  private static func wait(while word: UInt32, until deadline: Deadline) {
    LockWord.sleep(gate, while: word, until: deadline)
  }

  private static func wakeAll() { LockWord.wake(gate, count: .max) }
}
