import CLinux
import Glibc
import Synchronization

/// Lets the child of a fork use the library anew, whatever the parent's threads were doing.
///
/// State of the whole process is of three kinds: words that nobody locks; locks and tables that a
/// handler of their own replaces in the child before `fork` returns there; and what has locks that
/// cannot be replaced (other libraries, the first use of a global of Swift), which is used inside
/// `excluded` only, and a fork waits for that. Objects behind handles are none of these: the child
/// cannot reach them.
package enum Fork {
  /// Threads inside `excluded`, and in the upper half threads that are about to fork.
  private static let gate = Atomic<UInt32>(0)
  private static let insideMask: UInt32 = 0xFFFF
  private static let forking: UInt32 = 0x1_0000

  /// A fork waits no longer: somebody inside may itself wait for what the forking thread holds, as
  /// when a library forks while it is being loaded.
  private static let patienceMilliseconds: UInt64 = 2000

  private static let forkCount = Atomic<UInt32>(1)
  private static let preparing = Atomic<UInt32>(LockWord.free)

  /// Another one in a child than in its parent: what a thread remembers of itself is void when this
  /// has changed. Never 0.
  @inline(__always)
  package static var generation: UInt32 { forkCount.load(ordering: .relaxed) }

  /// Runs `body` while nobody forks. It must be short, wait for nobody and call nobody back, and is
  /// not to be nested.
  package static func excluded<Result: ~Copyable, Failure: Error>(
    _ body: () throws(Failure) -> Result
  ) throws(Failure) -> Result {
    enter()
    defer { leave() }
    return try body()
  }

  /// Runs `body` before anything else needs what it touches, and never again; `flag` says whether
  /// that has been. For globals of Swift, whose first use takes a lock that names its thread: the
  /// child could neither open it nor wait for it.
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

  /// Has `body` run in every child before `fork` returns there. It must take no lock. Called once
  /// for each body, inside `excluded`.
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
    // 0: this is the child, and the parent's thread had been inside.
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

  // At load time, so that no call of the library can come before them. Nothing of the runtime is
  // needed for that.
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
    // A thread of the parent may be inside, where a fork did not wait for it any longer.
    preparing.store(LockWord.free, ordering: .relaxed)
    forkCount.wrappingAdd(1, ordering: .relaxed)
    if generation == 0 { forkCount.store(1, ordering: .relaxed) }
  }

  private static func wait(while word: UInt32, until deadline: Deadline) {
    LockWord.sleep(gate, while: word, until: deadline)
  }

  private static func wakeAll() { LockWord.wake(gate, count: .max) }
}
