import Glibc
import MooncakeSystem
import Synchronization
import Testing

@Suite struct LockTests {
  @Test func oneThreadAtATimeIsInside() throws {
    let threadCount = 4
    let rounds = 20_000
    let total = Shared()
    var threads: [WorkerThread] = []
    for _ in 0..<threadCount {
      threads.append(
        try WorkerThread.start(name: "lock") {
          for round in 0..<rounds {
            total.lock.withLock { value in
              let before = value
              // Lets others run, so that some find the lock held and sleep.
              if round % 1000 == 0 { sched_yield() }
              value = before + 1
            }
          }
        })
    }
    for thread in threads { thread.join() }
    #expect(total.lock.withLock { $0 } == threadCount * rounds)
  }

  @Test func asleepUntilTheHolderLeaves() throws {
    let total = Shared()
    let isInside = Futex()
    let holder = try WorkerThread.start(name: "lock") {
      total.lock.withLock { value in
        isInside.store(1)
        isInside.wakeAll()
        usleep(50_000)
        value = 7
      }
    }
    while isInside.value == 0 { isInside.wait(while: 0, until: .after(milliseconds: 1000)) }
    #expect(total.lock.withLock { $0 } == 7)
    holder.join()
  }

  @Test func errorsPassAndTheLockOpens() {
    let total = Shared()
    #expect(throws: Errno.self) {
      try total.lock.withLock { _ throws(Errno) in throw Errno(EBUSY) }
    }
    #expect(total.lock.withLock { $0 } == 0)
  }

  private final class Shared: Sendable { let lock = Lock(0) }
}

@Suite struct ForkTests {
  /// A fork waits for threads that hold the lock; others wait for the fork.
  @Test func aForkComesBetween() throws {
    let isInside = Futex()
    let flag = Flag()
    let thread = try WorkerThread.start(name: "fork") {
      Fork.excluded {
        isInside.store(1)
        isInside.wakeAll()
        usleep(50_000)
        flag.value.store(true, ordering: .releasing)
      }
    }
    while isInside.value == 0 { isInside.wait(while: 0, until: .after(milliseconds: 1000)) }
    let generation = Fork.generation
    let (status, sawEnd) = forked {
      guard flag.value.load(ordering: .acquiring) else { return 1 }
      return Fork.generation == generation ? 2 : Fork.excluded { 0 }
    }
    #expect(status == 0)
    #expect(sawEnd)
    #expect(Fork.generation == generation)
    thread.join()
  }

  private final class Flag: Sendable { let value = Atomic<Bool>(false) }

  /// The exit status of a child that runs `body`, and whether it exited normally.
  private func forked(_ body: () -> Int32) -> (Int32, Bool) {
    typealias Fork = @convention(c) () -> pid_t
    let fork = unsafeBitCast(dlsym(nil, "fork"), to: Fork.self)
    let child = fork()
    if child == 0 { _exit(body()) }
    var status: Int32 = 0
    waitpid(child, &status, 0)
    return (status >> 8 & 0xFF, status & 0x7F == 0)
  }
}

@Suite struct WriteSignalTests {
  @Test func aBrokenPipeIsAnError() {
    var ends: [Int32] = [-1, -1]
    #expect(pipe(&ends) == 0)
    close(ends[0])
    var byte: UInt8 = 1
    let (result, error) = withoutWriteSignals { (write(ends[1], &byte, 1), errno) }
    #expect(result == -1)
    #expect(error == EPIPE)
    var pending = sigset_t()
    sigpending(&pending)
    #expect(sigismember(&pending, SIGPIPE) == 0)
    close(ends[1])
  }
}
