import Glibc
import MooncakeBase
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

struct WorkerPoolTests {
  @Test func aLimitOfOneKeepsOrder() {
    let pool = WorkerPool(name: "test", threadLimit: 1)
    let order = Box<[Int]>([])
    for index in 0..<500 { #expect(pool.run { order.update { $0.append(index) } }) }
    pool.stop()
    #expect(order.value == Array(0..<500))
  }

  @Test func jobsRunBesideEachOther() {
    let pool = WorkerPool(name: "test", threadLimit: 4)
    let arrived = Box(0)
    // Each waits for all, so fewer than four threads would hang.
    for _ in 0..<4 {
      #expect(
        pool.run {
          arrived.update { $0 += 1 }
          _ = eventually(within: 10_000) { arrived.value >= 4 }
        })
    }
    #expect(eventually { arrived.value == 4 })
    pool.stop()
  }

  @Test func theLimitHolds() {
    let pool = WorkerPool(name: "test", threadLimit: 3)
    let counts = Box((running: 0, most: 0))
    for _ in 0..<60 {
      _ = pool.run {
        counts.update {
          $0.running += 1
          $0.most = max($0.most, $0.running)
        }
        usleep(500)
        counts.update { $0.running -= 1 }
      }
    }
    pool.stop()
    #expect(counts.value.most <= 3 && counts.value.running == 0)
  }

  @Test func stopWaitsAndThenRefuses() {
    let pool = WorkerPool(name: "test", threadLimit: 2)
    let done = Box(0)
    for _ in 0..<20 {
      _ = pool.run {
        usleep(2000)
        done.update { $0 += 1 }
      }
    }
    pool.stop()
    #expect(done.value == 20)
    #expect(!pool.run { done.update { $0 += 1 } })
    pool.stop()
    #expect(done.value == 20)
  }

  /// The reserved thread does not time out like the others, and still takes jobs.
  @Test func aReservedThreadStays() throws {
    let pool = WorkerPool(name: "test", threadLimit: 3)
    try pool.reserve()
    try pool.reserve()
    let names = Box<Set<pthread_t>>([])
    for _ in 0..<3 {
      _ = pool.run {
        names.update { $0.insert(pthread_self()) }
        // A thread that takes two jobs would leave another one unknown.
        _ = eventually { names.value.count == 3 }
      }
    }
    #expect(eventually { names.value.count == 3 })
    usleep(2_300_000)
    let later = Box<pthread_t?>(nil)
    #expect(pool.run { later.value = pthread_self() })
    #expect(eventually { later.value != nil })
    #expect(names.value.contains(later.value!))
    pool.stop()
    try pool.reserve()
    #expect(!pool.run {})
  }

  @Test func jobsOfManyThreads() throws {
    let pool = WorkerPool(name: "test", threadLimit: 4)
    let done = Atomic<Int>(0)
    try onThreads(4) { _ in
      for _ in 0..<500 { _ = pool.run { done.add(1, ordering: .relaxed) } }
    }
    pool.stop()
    #expect(done.load(ordering: .relaxed) == 2000)
  }

  /// The last owner may release the pool's user inside a job, which stops the pool there.
  @Test func stopFromAJob() {
    let pool = WorkerPool(name: "test", threadLimit: 2)
    let isDone = Box(false)
    #expect(
      pool.run {
        pool.stop()
        isDone.value = true
      })
    #expect(eventually { isDone.value })
    pool.stop()
    #expect(!pool.run {})
  }
}
