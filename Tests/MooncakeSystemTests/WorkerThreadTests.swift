import CLinux
import Glibc
import MooncakeSystem
import Synchronization
import Testing

struct WorkerThreadTests {
  @Test func runsNamedAndWithoutSignals() throws {
    let seen = Lock<(name: String, blocksEverything: Bool)>(("", false))
    var before = sigset_t()
    pthread_sigmask(SIG_SETMASK, nil, &before)
    let thread = try WorkerThread.start(name: "a-name-that-is-too-long") {
      var name = [CChar](repeating: 0, count: 32)
      pthread_getname_np(pthread_self(), &name, name.count)
      var mask = sigset_t()
      pthread_sigmask(SIG_SETMASK, nil, &mask)
      let text = name.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
      let blocks = [SIGINT, SIGTERM, SIGUSR1, SIGALRM].allSatisfy { sigismember(&mask, $0) == 1 }
      seen.withLock { $0 = (text, blocks) }
    }
    thread.join()
    #expect(seen.withLock { $0.name } == "a-name-that-is-")
    #expect(seen.withLock { $0.blocksEverything })
    var mask = sigset_t()
    pthread_sigmask(SIG_SETMASK, nil, &mask)
    for signal in 1...31 {
      #expect(sigismember(&mask, Int32(signal)) == sigismember(&before, Int32(signal)))
    }
  }

  @Test func knowsItself() throws {
    let thread = Lock<WorkerThread?>(nil)
    let isCurrent = Atomic<Bool>(false)
    let started = try WorkerThread.start(name: "self") {
      while true {
        if let known = thread.withLock({ $0 }) {
          isCurrent.store(known.isCurrent, ordering: .relaxed)
          return
        }
        usleep(100)
      }
    }
    thread.withLock { $0 = started }
    started.join()
    thread.withLock { $0 = nil }
    #expect(isCurrent.load(ordering: .relaxed) && !started.isCurrent)
  }

  /// An owner that keeps its own thread, as most do, is freed all the same.
  @Test func whatItRunsIsLetGo() throws {
    final class Owner: Sendable { let thread = Lock<WorkerThread?>(nil) }
    weak var left: Owner?
    do {
      let owner = Owner()
      left = owner
      let thread = try WorkerThread.start(name: "owned") { withExtendedLifetime(owner) {} }
      owner.thread.withLock { $0 = thread }
      thread.join()
    }
    #expect(left == nil)
  }

  @Test func detached() throws {
    final class Flag: Sendable { let value = Atomic<Bool>(false) }
    let flag = Flag()
    try WorkerThread.startDetached(name: "detached") {
      flag.value.store(true, ordering: .releasing)
    }
    let deadline = Deadline.after(milliseconds: 5000)
    while !flag.value.load(ordering: .acquiring), !deadline.hasPassed { usleep(100) }
    #expect(flag.value.load(ordering: .acquiring) == true)
  }
}

struct DeadlineTests {
  @Test func edges() {
    #expect(Deadline.never.remainingMilliseconds == -1 && !Deadline.never.hasPassed)
    #expect(Deadline.never.timespecValue == nil)
    #expect(Deadline.after(milliseconds: .max) == .never)
    #expect(Deadline.after(milliseconds: UInt64.max / 1_000_000) == .never)
    #expect(Deadline(nanoseconds: 0).hasPassed)
    #expect(Deadline(nanoseconds: 0).remainingMilliseconds == 0)
    let soon = Deadline.after(milliseconds: 60_000)
    #expect(!soon.hasPassed && soon < .never)
    #expect((59_000...60_000).contains(soon.remainingMilliseconds))
    #expect(Deadline(nanoseconds: .max - 1).remainingMilliseconds == .max)
    let time = Deadline(nanoseconds: 3_000_000_007).timespecValue
    #expect(time?.tv_sec == 3 && time?.tv_nsec == 7)
  }
}
