import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// Requests that are submitted and waited for together.
///
/// Life: `beginSubmit`, slices are queued, and `Batch.end` ends each of them. The end that brings
/// `outstanding` to zero announces the batch. `announcing` holds `free` off until that announcement
/// is over.
///
/// Pollers may see the last request end a few instructions before the batch; once every request is
/// seen to have ended, `settle` waits for the batch.
package final class Batch: @unchecked Sendable {
  // Unchecked: tasks are written by one submitter before they are published, then through atomics.
  package let capacity: Int
  package let tasks: UnsafeMutablePointer<TransferTask>
  /// The first slice of each task; for most requests the only one.
  package let slices: UnsafeMutablePointer<Slice>
  package var id: UInt64 = 0

  private let isSubmitting = Atomic<Bool>(false)
  private let submitted = Atomic<Int>(0)
  /// What the batch still waits for: requests in the low half, its notifications above them.
  private let outstanding = Atomic<UInt64>(0)
  private let announcing = Atomic<Int>(0)
  private let terminal = Atomic<Int>(0)
  private let completed = Atomic<Int>(0)
  private let transferredBytes = Atomic<UInt64>(0)
  private let failureWord = Atomic<UInt32>(0)
  private let cancelRequested = Atomic<Bool>(false)

  private let doorbell = Futex()
  private let sleepers = Atomic<Int>(0)
  private let eventDescriptor = Atomic<Int32>(-1)
  private let text = Lock<String>("")

  package typealias Callback = @Sendable (UInt64, BatchStatus) -> Void
  private let callback = Lock<Callback?>(nil)
  // Written before the first submit, read after it.
  private var hasCallback = false
  /// A notification to the first request's segment, sent once everything has completed.
  package struct PendingNotification: Sendable {
    package var segment: SegmentID
    package var notification: Notification
    package var deadline: UInt64

    package init(segment: SegmentID, notification: Notification, deadline: UInt64) {
      self.segment = segment
      self.notification = notification
      self.deadline = deadline
    }
  }
  private let notification = Lock<PendingNotification?>(nil)

  // Parts of `outstanding`.
  private static let requestMask: UInt64 = 1 << 32 - 1
  /// A notification waits for the last request; the thread that ends that request must take it.
  private static let holdsNotification: UInt64 = 1 << 32
  /// One notification being delivered; after another submit there may be several.
  private static let delivery: UInt64 = 1 << 33

  // The engine outlives every use of its batches.
  package unowned(unsafe) let announcer: (any BatchAnnouncer)?
  package let pool: SlicePool
  /// The engine's drivers, and which of them its slices have been queued on since it last had none.
  package let driverTable: DriverTable
  package var drivers: DriverSet { DriverSet(bits: driverBits.load(ordering: .acquiring)) }
  // Another thread may poll while one submits.
  private let driverBits = Atomic<UInt64>(0)
  /// Waiters that drive instead of sleeping on the doorbell.
  private let drivingCount = Atomic<Int>(0)
  /// Whether the last submit was so large that waiters should sleep instead of spinning.
  package var isBulk: Bool {
    get { bulkFlag.load(ordering: .relaxed) }
    set { bulkFlag.store(newValue, ordering: .relaxed) }
  }
  private let bulkFlag = Atomic<Bool>(false)
  package init(
    capacity: Int, pool: SlicePool, drivers: DriverTable, announcer: (any BatchAnnouncer)?
  ) {
    self.capacity = capacity
    self.pool = pool
    driverTable = drivers
    self.announcer = announcer
    tasks = .allocate(capacity: capacity)
    slices = .allocate(capacity: capacity)
  }

  deinit {
    tasks.deinitialize(count: initializedTasks)
    tasks.deallocate()
    slices.deallocate()
    let descriptor = eventDescriptor.load(ordering: .relaxed)
    if descriptor >= 0 { close(descriptor) }
  }

  private var initializedTasks = 0

  /// Clears a terminal batch for reuse; only its sole user may call this.
  package func reset() {
    submitted.store(0, ordering: .relaxed)
    terminal.store(0, ordering: .relaxed)
    completed.store(0, ordering: .relaxed)
    transferredBytes.store(0, ordering: .relaxed)
    failureWord.store(0, ordering: .relaxed)
    cancelRequested.store(false, ordering: .relaxed)
    driverBits.store(0, ordering: .relaxed)
  }
}

/// What a batch asks of its engine when it becomes terminal.
package protocol BatchAnnouncer: AnyObject, Sendable {
  func announce(_ batch: Batch)
  func deliver(_ notification: Batch.PendingNotification, of batch: Batch)
  func run(_ callback: @escaping Batch.Callback, of batch: Batch, status: BatchStatus)
}

// MARK: - Submitting

extension Batch {
  /// Reserves `count` tasks for the calling thread; `endSubmit` must follow.
  package func beginSubmit(_ count: Int) throws(MooncakeError) -> Int {
    if isSubmitting.exchange(true, ordering: .acquiring) {
      throw MooncakeError(.busy, "another thread is submitting to this batch")
    }
    let first = submitted.load(ordering: .relaxed)
    if count > capacity - first {
      isSubmitting.store(false, ordering: .releasing)
      throw MooncakeError(
        .full, "batch capacity is \(capacity), \(first) used, \(count) more requested")
    }
    return first
  }

  /// Writes the slice of a reserved task.
  package func prepare(_ index: Int, segment: SegmentID, _ slice: Slice) {
    let task = tasks + index
    if index < initializedTasks {
      task.pointee.segment = segment
    } else {
      task.initialize(to: TransferTask(batch: self, segment: segment))
      initializedTasks = index + 1
    }
    (slices + index).initialize(to: slice)
    task.pointee.start(sliceCount: 1)
  }

  /// Publishes `count` prepared tasks; from here each must end through `Batch.end`.
  package func publish(_ count: Int, notification pending: PendingNotification?) {
    // If all earlier requests have ended, let the batch end before it starts again.
    _ = settle()
    var old = outstanding.load(ordering: .acquiring)
    while true {
      if old & Self.requestMask == 0, old & Self.holdsNotification != 0 {
        // The former notification belongs to requests that have ended; the thread that ended the
        // last is about to take it.
        sched_yield()
        old = outstanding.load(ordering: .acquiring)
        continue
      }
      // Let the former end be announced with its own status first.
      if old == 0 {
        waitUntilQuiet()
        driverBits.store(0, ordering: .relaxed)
      }
      let held = pending == nil ? old : old | Self.holdsNotification
      let (isAdded, current) = outstanding.weakCompareExchange(
        expected: old, desired: held + UInt64(count),
        successOrdering: .acquiringAndReleasing, failureOrdering: .acquiring)
      if isAdded { break }
      old = current
    }
    // None of the new requests ends before this returns, so nobody takes the notification yet.
    if let pending { notification.withLock { $0 = pending } }
    submitted.wrappingAdd(count, ordering: .releasing)
    if old == 0 {
      announcing.wrappingAdd(1, ordering: .acquiringAndReleasing)
      clearEvent()
    }
  }

  /// Ends what `beginSubmit` began; unpublished tasks are given back.
  package func endSubmit() { isSubmitting.store(false, ordering: .releasing) }

  private func clearEvent() {
    let descriptor = eventDescriptor.load(ordering: .acquiring)
    if descriptor < 0 { return }
    var value: UInt64 = 0
    _ = read(descriptor, &value, 8)
  }
}

// MARK: - Ending

extension Batch {
  /// Ends a slice; the engine must not touch its memory afterwards. `reason` is evaluated only for
  /// the batch's first failure.
  @inline(__always)
  package static func end(
    _ slice: SlicePointer, _ outcome: Outcome, reason: @autoclosure () -> String = ""
  ) {
    slice.pointee.assertUnlisted()
    let task = slice.pointee.task
    if slice.pointee.wasCut, outcome == .completed, !task.pointee.noteLife(slice.pointee.life) {
      return endStray(slice)
    }
    let batch = task.pointee.batch
    let length = slice.pointee.length
    if outcome != .completed { batch.recordFailure(outcome, task.pointee.segment, reason) }
    // Before the task ends: afterwards the batch, with the slices it owns, may be gone.
    if slice.pointee.isPooled { batch.pool.give(slice) }
    if let final = task.pointee.endSlice(outcome, byteCount: length) { batch.endTask(task, final) }
  }

  /// Ends a piece that was moved after the target had restarted, while others were before.
  private static func endStray(_ slice: SlicePointer) {
    end(
      slice, .failed(.unreachable),
      reason: "the peer restarted in mid-transfer; its buffers are new")
  }

  private func recordFailure(_ outcome: Outcome, _ segment: SegmentID, _ reason: () -> String) {
    if failureWord.load(ordering: .relaxed) != 0 { return }
    let (first, _) = failureWord.compareExchange(
      expected: 0, desired: outcome.rawValue, ordering: .acquiringAndReleasing)
    if !first { return }
    let message = reason()
    text.withLock { $0 = message }
    if outcome.state != .canceled { Log.warning(message, about: "segment \(segment)") }
  }

  private func endTask(_ task: UnsafeMutablePointer<TransferTask>, _ final: Outcome) {
    // Counters first: whoever sees the task's end must see it counted.
    if final == .completed { completed.wrappingAdd(1, ordering: .relaxed) }
    transferredBytes.wrappingAdd(task.pointee.byteCount, ordering: .relaxed)
    terminal.wrappingAdd(1, ordering: .relaxed)
    task.pointee.publish(final)
    let left = outstanding.wrappingSubtract(1, ordering: .sequentiallyConsistent).newValue
    // If neither holds, the batch may be gone already.
    if left == 0 { return announce() }
    if left & Self.requestMask == 0, left & Self.holdsNotification != 0 { releaseNotification() }
  }

  /// Sends the notification that waited for the last request, or drops it after a failure.
  private func releaseNotification() {
    let pending = notification.withLock { slot in
      defer { slot = nil }
      return slot
    }
    guard let pending, let announcer, failureWord.load(ordering: .acquiring) == 0 else {
      return endHold(Self.holdsNotification)
    }
    // In one step, so that the batch never looks ended in between.
    outstanding.wrappingAdd(Self.delivery - Self.holdsNotification, ordering: .releasing)
    announcer.deliver(pending, of: self)
  }

  /// Ends the hold of a notification in delivery on the batch.
  package func endNotification(_ error: MooncakeError?) {
    if let error { recordFailure(.failed(error.code), tasks[0].segment) { error.message } }
    endHold(Self.delivery)
  }

  private func endHold(_ hold: UInt64) {
    let left = outstanding.wrappingSubtract(hold, ordering: .sequentiallyConsistent).newValue
    if left == 0 { announce() }
  }

  /// Status of one request. Completion is not shown while the batch owes a notification, so that
  /// pollers of requests see the end only after the peer has been told.
  package func status(of index: Int) -> TransferStatus {
    var status = tasks[index].status
    if status.state == .completed, owesNotification { status.state = .waiting }
    return status
  }

  private var owesNotification: Bool { outstanding.load(ordering: .acquiring) > Self.requestMask }

  private func announce() {
    let callback = self.callback.withLock { $0 }
    let announcer = self.announcer
    let finalStatus = callback == nil ? nil : status
    doorbell.increment()
    if sleepers.load(ordering: .sequentiallyConsistent) > 0 { doorbell.wakeAll() }
    // A driver may be asleep on its sockets although another thread ended the batch.
    if drivingCount.load(ordering: .sequentiallyConsistent) > 0 {
      driverTable.kickExclusive(drivers)
    }
    let descriptor = eventDescriptor.load(ordering: .acquiring)
    if descriptor >= 0 {
      var one: UInt64 = 1
      _ = write(descriptor, &one, 8)
    }
    announcer?.announce(self)
    if let callback, let finalStatus {
      announcer?.run(callback, of: self, status: finalStatus)
    }
    // Last: after this the batch may be freed by its owner.
    announcing.wrappingSubtract(1, ordering: .acquiringAndReleasing)
  }
}

// MARK: - Observing

extension Batch {
  /// Whether every submitted request is terminal.
  @inline(__always)
  package var isTerminal: Bool { outstanding.load(ordering: .sequentiallyConsistent) == 0 }

  /// As `isTerminal`, but also waits for the batch if every request is seen to have ended: the
  /// threads that ended them are a few instructions from ending the batch.
  @inline(__always)
  package func settle() -> Bool {
    while true {
      let left = outstanding.load(ordering: .sequentiallyConsistent)
      if left == 0 { return true }
      // A delivery may take long, and until it is over pollers do not see every request end.
      if left >= Self.delivery { return false }
      let count = submitted.load(ordering: .acquiring)
      if terminal.load(ordering: .acquiring) != count { return false }
      let hasFailed = failureWord.load(ordering: .acquiring) != 0
      if left & Self.requestMask == 0 && !hasFailed { return false }
      sched_yield()
    }
  }

  /// Whether anybody is told of the batch's end without waiting or polling for it.
  package var hasListener: Bool {
    eventDescriptor.load(ordering: .acquiring) >= 0 || hasCallback || owesNotification
  }

  package var submittedCount: Int { submitted.load(ordering: .acquiring) }

  package var failureMessage: String { text.withLock { $0 } }

  package var isCancelRequested: Bool { cancelRequested.load(ordering: .acquiring) }

  package func requestCancel() { cancelRequested.store(true, ordering: .releasing) }

  package var status: BatchStatus {
    while true {
      let seen = currentStatus
      // Retry if another thread submitted in between: the counts would mix before and after.
      if seen.submittedCount == UInt64(submittedCount) { return seen }
    }
  }

  private var currentStatus: BatchStatus {
    let submittedCount = UInt64(self.submittedCount)
    let isTerminal = settle()
    let failure = Outcome(rawValue: failureWord.load(ordering: .acquiring))
    let state: TransferState =
      !isTerminal ? .waiting : failure == .waiting ? .completed : failure.state
    return BatchStatus(
      state: state, error: isTerminal ? failure.error : nil, submittedCount: submittedCount,
      completedCount: UInt64(completed.load(ordering: .acquiring)),
      terminalCount: UInt64(terminal.load(ordering: .acquiring)),
      transferredBytes: transferredBytes.load(ordering: .relaxed))
  }

  /// Drives `driver`, the only exclusive one of `set`, until the batch is terminal, has another set
  /// of drivers, or the deadline; returns false if another thread does.
  package func drive(_ driver: any Driver, of set: DriverSet, until deadline: Deadline) -> Bool {
    drivingCount.wrappingAdd(1, ordering: .sequentiallyConsistent)
    defer { drivingCount.wrappingSubtract(1, ordering: .relaxed) }
    // The batch may have ended and begun again with other drivers before `drivingCount` was seen.
    return driver.driveIfFree(until: deadline) { isTerminal || drivers != set }
  }

  /// Remembers what slices of the running submit are queued on.
  package func use(_ drivers: DriverSet) {
    driverBits.bitwiseOr(drivers.bits, ordering: .acquiringAndReleasing)
  }

  /// Sleeps until the batch is terminal or the deadline; returns whether it is terminal.
  package func sleep(until deadline: Deadline) -> Bool {
    // Sequentially consistent: either the announcer sees the sleeper or the sleeper sees the end.
    sleepers.wrappingAdd(1, ordering: .sequentiallyConsistent)
    defer { sleepers.wrappingSubtract(1, ordering: .relaxed) }
    while true {
      let bell = doorbell.value
      if isTerminal { return true }
      if deadline.hasPassed { return false }
      doorbell.wait(while: bell, until: deadline)
    }
  }

  /// The descriptor that is readable while the batch is terminal; created on first use.
  package func openEventDescriptor() throws(MooncakeError) -> Int32 {
    let existing = eventDescriptor.load(ordering: .acquiring)
    if existing >= 0 { return existing }
    let event: EventFD
    do throws(Errno) { event = try EventFD() } catch {
      throw MooncakeError(.system, "event descriptor: \(error)")
    }
    let (stored, current) = eventDescriptor.compareExchange(
      expected: -1, desired: event.descriptor.rawValue, ordering: .acquiringAndReleasing)
    if !stored { return current }
    if isTerminal && submittedCount > 0 { event.signal() }
    return event.keepOpen()
  }

  package func setCallback(_ new: @escaping Callback) throws(MooncakeError) {
    if submittedCount > 0 {
      throw MooncakeError(.busy, "set the callback before the first submit to the batch")
    }
    callback.withLock { $0 = new }
    hasCallback = true
  }

  /// Waits until no announcement touches the batch any more. An announcement only signals and takes
  /// microseconds.
  package func waitUntilQuiet() {
    while announcing.load(ordering: .acquiring) > 0 { sched_yield() }
  }

  /// Makes sure that the event descriptor shows the end that the caller has seen.
  package func waitUntilSignaled() {
    if eventDescriptor.load(ordering: .acquiring) >= 0 { waitUntilQuiet() }
  }
}
