import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Counts a batch's calls to its engine.
private final class CountingAnnouncer: BatchAnnouncer {
  let announcements = Atomic<Int>(0)
  let callbacks = Atomic<Int>(0)
  let delivered = Lock<[Notification]>([])

  func announce(_ batch: Batch) { announcements.add(1, ordering: .relaxed) }

  func deliver(_ notification: Batch.PendingNotification, of batch: Batch) {
    delivered.withLock { $0.append(notification.notification) }
  }

  func run(_ callback: @escaping Batch.Callback, of batch: Batch, status: BatchStatus) {
    callbacks.add(1, ordering: .relaxed)
    callback(batch.id, status)
  }
}

struct BatchTests {
  private let announcer = CountingAnnouncer()
  // No slice in these tests moves a byte.
  private let memory = UnsafeMutableRawPointer(bitPattern: 4096)!

  private func makeBatch(_ capacity: Int) -> Batch {
    Batch(capacity: capacity, pool: SlicePool(), drivers: DriverTable(), announcer: announcer)
  }

  private func submit(
    _ batch: Batch, _ count: Int, notification: Notification? = nil
  ) throws(MooncakeError) -> Range<Int> {
    let first = try batch.beginSubmit(count)
    for index in first..<(first + count) {
      batch.prepare(
        index, segment: 1,
        Slice(
          task: batch.tasks + index, local: memory, remote: 0, length: 10, deadline: .max,
          opcode: .read, isPooled: false))
    }
    batch.publish(
      count,
      notification: notification.map { .init(segment: 1, notification: $0, deadline: .max) })
    batch.endSubmit()
    return first..<(first + count)
  }

  /// Checks whether every view of a batch says terminal.
  private func expect(
    _ batch: Batch, _ state: TransferState, _ error: MooncakeError.Code?, submitted: UInt64,
    completed: UInt64, bytes: UInt64
  ) {
    let status = batch.status
    #expect(status.state == state && status.error == error)
    #expect(status.submittedCount == submitted && status.terminalCount == submitted)
    #expect(status.completedCount == completed && status.transferredBytes == bytes)
  }

  @Test func countsAndFirstFailure() throws {
    let batch = makeBatch(4)
    #expect(batch.isTerminal && batch.status.submittedCount == 0)
    let range = try submit(batch, 4)
    #expect(!batch.isTerminal && batch.status.state == .waiting)
    Batch.end(batch.slices + range.lowerBound, .completed)
    Batch.end(batch.slices + 1, .failed(.unreachable), reason: "first")
    Batch.end(batch.slices + 2, .failed(.protocolViolation), reason: "second")
    #expect(batch.status.state == .waiting && batch.status.error == nil)
    #expect(batch.status.terminalCount == 3)
    #expect(batch.status(of: 0).state == .completed && batch.status(of: 3).state == .waiting)
    #expect(announcer.announcements.load(ordering: .relaxed) == 0)
    Batch.end(batch.slices + 3, .completed)
    #expect(batch.isTerminal)
    expect(batch, .failed, .unreachable, submitted: 4, completed: 2, bytes: 20)
    #expect(batch.failureMessage == "first")
    #expect(batch.status(of: 2).error == .protocolViolation)
    #expect(announcer.announcements.load(ordering: .relaxed) == 1)
    batch.waitUntilQuiet()
  }

  @Test func oneSubmitterAtATime() throws {
    let batch = makeBatch(4)
    #expect(try batch.beginSubmit(2) == 0)
    #expect(failureCode { () throws(MooncakeError) in _ = try batch.beginSubmit(1) } == .busy)
    batch.endSubmit()
    #expect(try submit(batch, 3) == 0..<3)
    #expect(failureCode { () throws(MooncakeError) in _ = try batch.beginSubmit(2) } == .full)
    #expect(failureCode { () throws(MooncakeError) in _ = try batch.beginSubmit(.max) } == .full)
    #expect(try submit(batch, 1) == 3..<4)
    for index in 0..<4 { Batch.end(batch.slices + index, .completed) }
    #expect(batch.status.completedCount == 4)
  }

  @Test func striped() throws {
    let batch = makeBatch(1)
    _ = try submit(batch, 1)
    batch.tasks[0].start(sliceCount: 3)
    var pooled = batch.pool.take(2)
    let first = pooled!
    pooled = first.pointee.next
    let others = [first, pooled!]
    for slice in others {
      slice.initialize(
        to: Slice(
          task: batch.tasks, local: memory, remote: 0, length: 7, deadline: .max, opcode: .read,
          isPooled: true))
    }
    Batch.end(others[0], .completed)
    Batch.end(batch.slices, .completed)
    #expect(batch.status(of: 0).state == .waiting)
    #expect(batch.status(of: 0).transferredBytes == 17)
    Batch.end(others[1], .failed(.unreachable), reason: "broken")
    let status = batch.status(of: 0)
    #expect(status.state == .failed && status.error == .unreachable)
    #expect(batch.status.completedCount == 0 && batch.status.transferredBytes == 17)
  }

  /// The notification is sent once all is completed; only then is the batch terminal.
  @Test func notificationIsLast() throws {
    let batch = makeBatch(4)
    let text = Notification(name: "n", message: "m")
    _ = try submit(batch, 2, notification: text)
    Batch.end(batch.slices, .completed)
    #expect(announcer.delivered.withLock { $0.isEmpty })
    Batch.end(batch.slices + 1, .completed)
    #expect(announcer.delivered.withLock { $0 } == [text])
    #expect(!batch.isTerminal && batch.status(of: 1).state == .waiting)
    batch.endNotification(nil)
    #expect(batch.isTerminal && batch.status.state == .completed)
    #expect(batch.status(of: 1).state == .completed)

    _ = try submit(batch, 2, notification: text)
    Batch.end(batch.slices + 2, .completed)
    Batch.end(batch.slices + 3, .failed(.unreachable), reason: "broken")
    #expect(batch.isTerminal && batch.status.state == .failed)
    #expect(announcer.delivered.withLock { $0.count } == 1)
  }

  @Test func undeliverableNotification() throws {
    let batch = makeBatch(1)
    _ = try submit(batch, 1, notification: Notification(name: "n", message: "m"))
    Batch.end(batch.slices, .completed)
    batch.endNotification(MooncakeError(.full, "the peer's queue is full"))
    #expect(batch.isTerminal && batch.status.error == .full)
    #expect(batch.failureMessage == "the peer's queue is full")
    #expect(batch.status.completedCount == 1)
  }

  @Test func callbackAtEachEnd() throws {
    let batch = makeBatch(4)
    let states = Box<[TransferState]>([])
    try batch.setCallback { _, status in states.update { $0.append(status.state) } }
    for index in 0..<2 {
      _ = try submit(batch, 1)
      #expect(states.value.count == index)
      Batch.end(batch.slices + index, index == 0 ? .completed : .canceled)
      #expect(states.value.count == index + 1)
    }
    #expect(states.value == [.completed, .canceled])
    #expect(failureCode { () throws(MooncakeError) in try batch.setCallback { _, _ in } } == .busy)
  }

  @Test func resetMakesItNew() throws {
    let batch = makeBatch(2)
    _ = try submit(batch, 2)
    for index in 0..<2 { Batch.end(batch.slices + index, .failed(.unreachable), reason: "x") }
    batch.waitUntilQuiet()
    batch.reset()
    #expect(batch.submittedCount == 0)
    #expect(try submit(batch, 2) == 0..<2)
    #expect(batch.status(of: 0).state == .waiting)
    for index in 0..<2 { Batch.end(batch.slices + index, .completed) }
    expect(batch, .completed, nil, submitted: 2, completed: 2, bytes: 20)
  }

  /// Sleepers wake at the end; the ends come from several threads.
  @Test func endsOfManyThreads() throws {
    for _ in 0..<50 {
      let batch = makeBatch(64)
      _ = try submit(batch, 64)
      let complaints = Complaints()
      let sleeper = try WorkerThread.start(name: "sleeper") {
        complaints.require(batch.sleep(until: .after(milliseconds: 10_000)), "not woken")
        complaints.require(batch.status.terminalCount == 64, "woken early")
      }
      try onThreads(4) { thread in
        for index in 0..<16 { Batch.end(batch.slices + (thread * 16 + index), .completed) }
      }
      sleeper.join()
      #expect(complaints.all.isEmpty, "\(complaints.all)")
      batch.waitUntilQuiet()
    }
    #expect(announcer.announcements.load(ordering: .relaxed) == 50)
  }

  /// A caller that has seen every request end sees the batch ended, in every way there is.
  @Test func endedWithItsLastRequest() throws {
    let batch = makeBatch(4000)
    let states = Box<[TransferState]>([])
    try batch.setCallback { _, status in states.update { $0.append(status.state) } }
    let descriptor = try batch.openEventDescriptor()
    let published = Atomic<Int>(0)
    let complaints = Complaints()
    let rounds = batch.capacity / 2
    let ender = try WorkerThread.start(name: "ender") {
      for index in 0..<(2 * rounds) {
        while published.load(ordering: .acquiring) <= index { sched_yield() }
        Batch.end(batch.slices + index, .completed)
      }
    }
    for round in 0..<rounds {
      let range = try submit(batch, 2)
      published.store(range.upperBound, ordering: .releasing)
      while range.contains(where: { !batch.status(of: $0).state.isTerminal }) { sched_yield() }
      switch round % 3 {
      case 0: complaints.require(batch.settle(), "round \(round): may not be freed")
      case 1: complaints.require(batch.status.state == .completed, "round \(round)")
      // Another submit is another end.
      default: break
      }
    }
    ender.join()
    batch.waitUntilQuiet()
    #expect(complaints.all.isEmpty, "\(complaints.all.prefix(3))")
    #expect(states.value == [TransferState](repeating: .completed, count: rounds))
    #expect(isReadable(descriptor, within: 0))
  }

  /// A failed request ends the batch at once, even with a notification, and it may be freed.
  @Test func endedWithAFailureAndANotification() throws {
    let batch = makeBatch(2000)
    let published = Atomic<Int>(0)
    let complaints = Complaints()
    let ender = try WorkerThread.start(name: "ender") {
      for index in 0..<batch.capacity {
        while published.load(ordering: .acquiring) <= index { sched_yield() }
        Batch.end(batch.slices + index, .failed(.unreachable), reason: "broken")
      }
    }
    for index in 0..<batch.capacity {
      _ = try submit(batch, 1, notification: Notification(name: "n", message: "m"))
      published.store(index + 1, ordering: .releasing)
      while !batch.status(of: index).state.isTerminal { sched_yield() }
      complaints.require(batch.settle(), "request \(index)")
    }
    ender.join()
    #expect(complaints.all.isEmpty, "\(complaints.all.prefix(3))")
    #expect(announcer.delivered.withLock { $0.isEmpty })
  }

  /// A notification never leaves before the end of the requests submitted with it.
  @Test func overlappingNotifications() throws {
    let batch = makeBatch(4000)
    let published = Atomic<Int>(0)
    let ended = Atomic<Int>(0)
    let complaints = Complaints()
    let ender = try WorkerThread.start(name: "ender") { [announcer] in
      for index in 0..<batch.capacity {
        while published.load(ordering: .acquiring) <= index { sched_yield() }
        // Before the end itself, so that a delivery caused by it always sees this.
        ended.store(index + 1, ordering: .releasing)
        Batch.end(batch.slices + index, .completed)
        for sent in announcer.delivered.withLock({ taken in
          defer { taken = [] }
          return taken
        }) {
          let last = Int(sent.message) ?? 0
          complaints.require(last <= index, "\(last) was told at the end of \(index)")
          batch.endNotification(nil)
        }
      }
    }
    for index in 0..<batch.capacity {
      _ = try submit(batch, 1, notification: Notification(name: "n", message: String(index)))
      // The next submit overlaps the end of this one.
      while ended.load(ordering: .acquiring) < index { sched_yield() }
      published.store(index + 1, ordering: .releasing)
    }
    ender.join()
    #expect(complaints.all.isEmpty, "\(complaints.all.prefix(3))")
    #expect(batch.isTerminal && batch.status.completedCount == UInt64(batch.capacity))
  }

  /// A driver that never comes to an end by itself.
  private final class Endless: Driver {
    static let isExclusive = true

    func kick() {}
    func nudge() {}
    func requestSweep() {}
    func pollIfFree() -> Bool { false }
    func driveIfFree(until deadline: Deadline, isDone: () -> Bool) -> Bool {
      while !isDone() && !deadline.hasPassed { sched_yield() }
      return true
    }
  }

  /// A batch that ends and begins anew on another driver is not waited for on the former one, which
  /// nobody would wake.
  @Test func nobodyDrivesWhatTheBatchNoLongerUses() throws {
    let batch = makeBatch(2)
    let (driver, other) = (Endless(), Endless())
    let first = DriverSet(bit: try #require(batch.driverTable.add(driver)))
    let second = DriverSet(bit: try #require(batch.driverTable.add(other)))
    _ = try submit(batch, 1)
    batch.use(first)
    #expect(batch.drivers == first)
    Batch.end(batch.slices, .completed)
    _ = try submit(batch, 1)
    batch.use(second)
    #expect(batch.drivers == second)
    let time = elapsedMilliseconds {
      #expect(batch.drive(driver, of: first, until: .after(milliseconds: 10_000)))
    }
    #expect(time < 5000 && !batch.isTerminal)
    Batch.end(batch.slices + 1, .completed)
    #expect(batch.drive(other, of: second, until: .never))
  }

  @Test func sleepEndsAtItsDeadline() throws {
    let batch = makeBatch(1)
    _ = try submit(batch, 1)
    #expect(!batch.sleep(until: .after(milliseconds: 30)))
    Batch.end(batch.slices, .completed)
    #expect(batch.sleep(until: .after(milliseconds: 30)))
  }
}

struct BatchTableTests {
  private static func makeBatch() -> Batch {
    Batch(capacity: 1, pool: SlicePool(), drivers: DriverTable(), announcer: nil)
  }

  private static func code(_ table: BatchTable, _ id: UInt64) -> MooncakeError.Code? {
    failureCode { () throws(MooncakeError) in try table.with(id) { _ throws(MooncakeError) in } }
  }

  @Test func generations() throws {
    let table = BatchTable()
    var seen: Set<UInt64> = []
    for _ in 0..<100 {
      let batch = Self.makeBatch()
      let id = try table.insert(batch)
      #expect(batch.id == id && seen.insert(id).inserted)
      #expect(Self.code(table, id) == nil)
      try table.remove(id) { _ in true }
      for old in seen { #expect(Self.code(table, old) == .invalidHandle) }
    }
    for id: UInt64 in [0, 1 << 32, .max, 12_345, 1 << 63 | 1, 0xFFFF_FFFF] {
      #expect(Self.code(table, id) == .invalidHandle)
    }
  }

  @Test func busyBatchesStay() throws {
    let table = BatchTable()
    let id = try table.insert(Self.makeBatch())
    #expect(
      failureCode { () throws(MooncakeError) in try table.remove(id) { _ in false } } == .busy)
    #expect(Self.code(table, id) == nil)
    var ids: [UInt64] = []
    table.withEach { ids.append($0.id) }
    #expect(ids == [id])
    try table.remove(id) { _ in true }
    table.withEach { _ in ids.removeAll() }
    #expect(ids == [id])
  }

  /// The queue limit covers all batches, and freeing one makes room.
  @Test func requestsOfAllBatches() throws {
    let table = BatchTable()
    let share = BatchTable.requestLimit / 16
    func insert(_ capacity: Int) throws(MooncakeError) -> UInt64 {
      try table.insert(
        Batch(capacity: capacity, pool: SlicePool(), drivers: DriverTable(), announcer: nil))
    }
    var ids: [UInt64] = []
    for _ in 0..<16 { ids.append(try insert(share)) }
    #expect(failureCode { () throws(MooncakeError) in _ = try insert(1) } == .full)
    try table.remove(ids[0]) { _ in true }
    _ = try insert(share)
    #expect(failureCode { () throws(MooncakeError) in _ = try insert(1) } == .full)
  }

  @Test func full() throws {
    let table = BatchTable()
    let batch = Self.makeBatch()
    var ids: [UInt64] = []
    for _ in 0..<BatchTable.capacity { ids.append(try table.insert(batch)) }
    #expect(
      failureCode { () throws(MooncakeError) in _ = try table.insert(batch) } == .full)
    try table.remove(ids[777]) { _ in true }
    let again = try table.insert(batch)
    #expect(again != ids[777] && again & 0xFFFF_FFFF == ids[777] & 0xFFFF_FFFF)
    for id in ids where id != ids[777] { try table.remove(id) { _ in true } }
    try table.remove(again) { _ in true }
  }

  /// Users see a live batch or an error, never a freed one; one remover wins.
  @Test func usersAgainstRemovers() throws {
    let table = BatchTable()
    let current = Atomic<UInt64>(0)
    let removed = Atomic<Int>(0)
    let isDone = Atomic<Bool>(false)
    let complaints = Complaints()
    let rounds = 300
    try onThreads(4) { index in
      if index == 0 {
        for _ in 0..<rounds {
          guard let id = try? table.insert(Self.makeBatch()) else {
            complaints.add("insert")
            break
          }
          current.store(id, ordering: .releasing)
          while Self.code(table, id) == nil { sched_yield() }
        }
        isDone.store(true, ordering: .releasing)
        return
      }
      while !isDone.load(ordering: .acquiring) {
        let id = current.load(ordering: .acquiring)
        if index == 1 {
          try? table.with(id) { batch throws(MooncakeError) in
            complaints.require(batch.id == id, "another batch")
          }
        } else {
          let code = failureCode { () throws(MooncakeError) in try table.remove(id) { _ in true } }
          if code == nil { removed.add(1, ordering: .relaxed) }
          complaints.require(code == nil || code == .invalidHandle, "\(String(describing: code))")
        }
      }
    }
    #expect(removed.load(ordering: .relaxed) == rounds)
    #expect(complaints.all.isEmpty, "\(complaints.all.prefix(3))")
  }
}
