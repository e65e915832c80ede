import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Slices for testing queues: only their links are used.
private final class SliceArray: @unchecked Sendable {
  // Unchecked: each slice is in one queue at a time.
  let pointer: SlicePointer
  private let task: UnsafeMutablePointer<TransferTask>

  init(_ count: Int) {
    pointer = .allocate(capacity: count)
    // A queue never looks at the task.
    task = .allocate(capacity: 1)
    for index in 0..<count {
      (pointer + index).initialize(
        to: Slice(
          task: task, local: UnsafeMutableRawPointer(pointer), remote: UInt64(index), length: 1,
          deadline: .max, opcode: .read, isPooled: false))
    }
  }

  deinit {
    pointer.deallocate()
    task.deallocate()
  }

  func queue(_ range: Range<Int>) -> SliceQueue {
    var queue = SliceQueue()
    for index in range { queue.append(pointer + index) }
    return queue
  }
}

private func numbers(_ queue: consuming SliceQueue) -> [Int] {
  var queue = queue
  var result: [Int] = []
  while let slice = queue.popFirst() { result.append(Int(slice.pointee.remote)) }
  return result
}

struct SliceQueueTests {
  @Test func firstInFirstOut() {
    let slices = SliceArray(10)
    var queue = slices.queue(0..<4)
    #expect(queue.count == 4 && !queue.isEmpty)
    var other = slices.queue(4..<10)
    queue.append(contentsOf: &other)
    #expect(other.isEmpty && other.count == 0 && queue.count == 10)
    var nothing = SliceQueue()
    queue.append(contentsOf: &nothing)
    #expect(numbers(queue) == Array(0..<10))
    #expect(nothing.popFirst() == nil)
  }

  @Test func appendAfterItWasEmptied() {
    let slices = SliceArray(3)
    var queue = slices.queue(0..<1)
    _ = queue.popFirst()
    #expect(queue.isEmpty && queue.count == 0)
    queue.append(slices.pointer + 2)
    queue.append(slices.pointer + 1)
    #expect(numbers(queue) == [2, 1])
  }

  @Test func removeAllKeepsOrder() {
    let slices = SliceArray(10)
    var queue = slices.queue(0..<10)
    let removed = queue.removeAll { $0.pointee.remote % 3 == 0 }
    #expect(removed.count == 4 && queue.count == 6)
    #expect(numbers(removed) == [0, 3, 6, 9])
    #expect(numbers(queue) == [1, 2, 4, 5, 7, 8])
    var rest = slices.queue(0..<2)
    #expect(numbers(rest.removeAll { _ in true }) == [0, 1])
    #expect(rest.isEmpty)
    rest.append(slices.pointer)
    #expect(numbers(rest) == [0])
  }
}

struct SliceInboxTests {
  @Test func keepsOrderWithinAndBetweenPushes() {
    let slices = SliceArray(10)
    let inbox = SliceInbox()
    let isEmptyAtFirst = inbox.isEmpty && inbox.takeAll().isEmpty
    #expect(isEmptyAtFirst)
    inbox.push(SliceQueue())
    inbox.push(slices.queue(0..<3))
    inbox.push(slices.queue(3..<4))
    inbox.push(slices.queue(4..<10))
    let isEmptyThen = inbox.isEmpty
    let all = inbox.takeAll()
    let isEmptyAfterwards = inbox.isEmpty
    #expect(!isEmptyThen && isEmptyAfterwards && all.count == 10)
    #expect(numbers(all) == Array(0..<10))
  }

  /// Each pusher's slices come out in its order, and none is lost or doubled.
  @Test func manyPushersAndOneTaker() throws {
    final class Shared: Sendable {
      let inbox = SliceInbox()
      let isDone = Atomic<Bool>(false)
      let taken = Lock<[Int]>([])
    }
    let shared = Shared()
    let pushers = 4
    let each = 20_000
    let slices = SliceArray(pushers * each)
    let taker = try WorkerThread.start(name: "taker") {
      var result: [Int] = []
      while true {
        let isLast = shared.isDone.load(ordering: .acquiring)
        result += numbers(shared.inbox.takeAll())
        if isLast { break }
      }
      shared.taken.withLock { $0 = result }
    }
    try onThreads(pushers) { index in
      var next = index * each
      let end = next + each
      var size = 1
      while next < end {
        let count = min(size, end - next)
        shared.inbox.push(slices.queue(next..<(next + count)))
        next += count
        size = size % 7 + 1
      }
    }
    shared.isDone.store(true, ordering: .releasing)
    taker.join()
    let taken = shared.taken.withLock { $0 }
    #expect(taken.count == pushers * each)
    for index in 0..<pushers {
      let range = (index * each)..<((index + 1) * each)
      #expect(taken.filter { range.contains($0) } == Array(range), "pusher \(index)")
    }
  }
}

struct SlicePoolTests {
  @Test func givesEachSliceToOneTaker() throws {
    let pool = SlicePool()
    let complaints = Complaints()
    try onThreads(4) { index in
      for round in 0..<100 {
        let count = 1 + (index * 331 + round * 97) % 700
        var taken: [SlicePointer] = []
        var cursor = pool.take(count)
        while let slice = cursor {
          cursor = slice.pointee.next
          taken.append(slice)
        }
        complaints.require(taken.count == count, "\(taken.count) instead of \(count)")
        let mark = UInt8(index * 40 + round % 40)
        for slice in taken { slice.pointee.attempts = mark }
        sched_yield()
        complaints.require(taken.allSatisfy { $0.pointee.attempts == mark }, "shared slices")
        for slice in taken { pool.give(slice) }
      }
    }
    #expect(complaints.all.isEmpty, "\(complaints.all.prefix(3))")
    #expect(pool.take(0) == nil)
  }
}

struct OutcomeTests {
  @Test func packsStateAndError() {
    #expect(Outcome.waiting.rawValue == 0 && Outcome.waiting.state == .waiting)
    #expect(Outcome.waiting.error == nil)
    #expect(Outcome.completed.state == .completed && Outcome.completed.error == nil)
    #expect(Outcome.canceled.state == .canceled && Outcome.canceled.error == .canceled)
    #expect(Outcome.timeout.state == .timeout && Outcome.timeout.error == .timeout)
    for code in MooncakeError.Code.allCases {
      let outcome = Outcome.failed(code)
      let state: TransferState =
        code == .canceled ? .canceled : code == .timeout ? .timeout : .failed
      #expect(outcome.state == state && outcome.error == code)
      #expect(Outcome(rawValue: outcome.rawValue) == outcome)
    }
  }
}
