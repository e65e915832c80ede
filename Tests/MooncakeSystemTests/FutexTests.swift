import Glibc
import MooncakeSystem
import Synchronization
import Testing

struct FutexTests {
  private final class Shared: Sendable {
    let futex = Futex(7)
    let woken = Atomic<Int>(0)
  }

  @Test func values() {
    let futex = Futex()
    #expect(futex.value == 0)
    futex.decrement()
    #expect(futex.value == .max)
    futex.increment()
    #expect(futex.value == 0)
    futex.store(9)
    #expect(futex.exchange(4) == 9 && futex.value == 4)
  }

  @Test func returnsAtOnceForAnotherValue() {
    let futex = Futex(1)
    let start = Clock.now()
    futex.wait(while: 2, until: .never)
    #expect(Clock.now() - start < 1_000_000_000)
  }

  @Test func deadline() {
    let futex = Futex(1)
    let deadline = Deadline.after(milliseconds: 30)
    while !deadline.hasPassed { futex.wait(while: 1, until: deadline) }
    #expect(deadline.remainingNanoseconds == 0)
    futex.wait(while: 1, until: Deadline(nanoseconds: 0))
  }

  @Test func wakeAll() throws {
    let shared = Shared()
    let threads = try (0..<4).map { _ in
      try WorkerThread.start(name: "sleeper") {
        while shared.futex.value == 7 { shared.futex.wait(while: 7, until: .never) }
        shared.woken.add(1, ordering: .relaxed)
      }
    }
    usleep(10_000)
    #expect(shared.woken.load(ordering: .relaxed) == 0)
    shared.futex.store(8)
    shared.futex.wakeAll()
    for thread in threads { thread.join() }
    #expect(shared.woken.load(ordering: .relaxed) == 4)
  }
}
