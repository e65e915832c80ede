import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

extension TransferEngine {
  package static let batchCapacityLimit = 1 << 20

  /// Creates a batch for up to `capacity` requests over its life.
  public func createBatch(capacity: Int) throws(MooncakeError) -> BatchID {
    try checkOpen()
    guard (1...Self.batchCapacityLimit).contains(capacity) else {
      throw MooncakeError(
        .invalidArgument,
        "a batch holds 1 to \(Self.batchCapacityLimit) requests, not \(capacity)")
    }
    return try batches.insert(
      Batch(capacity: capacity, pool: router.pool, drivers: drivers, announcer: self))
  }

  /// Appends requests to a batch. Everything is checked before any request starts; later failures
  /// are in the status. A notification is sent to the segment of the first request once the whole
  /// batch has completed.
  public func submit(
    _ batch: BatchID, _ requests: UnsafeBufferPointer<TransferRequest>,
    timeoutMilliseconds: UInt64 = 0, notification: Notification? = nil
  ) throws(MooncakeError) {
    try submit(
      batch, count: requests.count, timeoutMilliseconds: timeoutMilliseconds,
      notification: notification
    ) { RawRequest(requests[$0]) }
  }

  /// As above with unchecked values.
  @inline(__always)
  package func submit(
    _ id: BatchID, count: Int, timeoutMilliseconds: UInt64, notification: Notification?,
    request: (Int) -> RawRequest
  ) throws(MooncakeError) {
    try batches.with(id) { batch throws(MooncakeError) in
      try submit(
        batch, count: count, timeoutMilliseconds: timeoutMilliseconds, notification: notification,
        isAsynchronous: true, request: request)
    }
  }

  @inline(__always)
  private func submit(
    _ batch: Batch, count: Int, timeoutMilliseconds: UInt64, notification: Notification?,
    isAsynchronous: Bool, request: (Int) -> RawRequest
  ) throws(MooncakeError) {
    guard count > 0 else {
      if count == 0 && notification == nil { return }
      throw MooncakeError(.invalidArgument, "there is no request to submit")
    }
    if let notification {
      try notification.validate()
      try workers.reserve()
    }
    try router.whileOpen { () throws(MooncakeError) in
      try router.submit(
        batch, count: count, deadline: deadline(timeoutMilliseconds).nanoseconds,
        notification: notification, isAsynchronous: isAsynchronous,
        isObserved: engineEvent.load(ordering: .relaxed) >= 0, request: request)
    }
  }

  /// Reads the status of a whole batch.
  public func poll(_ id: BatchID) throws(MooncakeError) -> BatchStatus {
    try batches.with(id) { batch throws(MooncakeError) in
      router.drivePolled(batch)
      return finalStatus(of: batch)
    }
  }

  /// Reads the status of one request.
  public func poll(_ id: BatchID, request index: Int) throws(MooncakeError) -> TransferStatus {
    try batches.with(id) { batch throws(MooncakeError) in
      guard index >= 0, index < batch.submittedCount else {
        throw MooncakeError(
          .invalidArgument,
          "request \(index) does not exist: \(batch.submittedCount) were submitted")
      }
      router.drivePolled(batch)
      return batch.status(of: index)
    }
  }

  /// Changes whenever part of an answer arrives from the segment. A status does not show that: it
  /// counts whole slices.
  package func partialArrivalCount(from segment: SegmentID) -> UInt64 {
    (try? segments.segment(segment))?.route.paths.reduce(0) { $0 &+ $1.partialArrivalCount } ?? 0
  }

  /// Waits until every submitted request is terminal. Throws `.timeout` if some are not by then; 0
  /// waits without limit.
  public func wait(
    _ id: BatchID, timeoutMilliseconds: UInt64 = 0
  ) throws(MooncakeError) -> BatchStatus {
    try batches.with(id) { batch throws(MooncakeError) in
      let deadline =
        timeoutMilliseconds == 0
        ? Deadline.never : Deadline.after(milliseconds: timeoutMilliseconds)
      guard router.waitUntilTerminal(batch, deadline) else {
        throw MooncakeError(.timeout, "the batch still runs after \(timeoutMilliseconds) ms")
      }
      return finalStatus(of: batch)
    }
  }

  /// The status. If it is terminal, the event descriptor shows the end as well.
  private func finalStatus(of batch: Batch) -> BatchStatus {
    let status = batch.status
    if status.state.isTerminal { batch.waitUntilSignaled() }
    return status
  }

  /// Soon ends as canceled every request that is not terminal.
  public func cancel(_ id: BatchID) throws(MooncakeError) {
    try batches.with(id) { batch throws(MooncakeError) in
      if batch.isTerminal { return }
      batch.requestCancel()
      router.sweepCanceled()
    }
  }

  /// Frees a batch whose requests are all terminal.
  public func freeBatch(_ id: BatchID) throws(MooncakeError) {
    try batches.remove(id) { $0.settle() }
  }

  /// Why the first request that did not complete failed; empty if none did.
  package func failureMessage(of id: BatchID) -> String {
    (try? batches.with(id) { batch throws(MooncakeError) in batch.failureMessage }) ?? ""
  }

  /// A descriptor that is readable while every submitted request is terminal. Owned by the batch.
  public func eventDescriptor(of id: BatchID) throws(MooncakeError) -> Int32 {
    try batches.with(id) { batch throws(MooncakeError) in try batch.openEventDescriptor() }
  }

  /// A descriptor that becomes readable when any batch has become terminal. Owned by the engine.
  public func eventDescriptor() throws(MooncakeError) -> Int32 {
    try checkOpen()
    let existing = engineEvent.load(ordering: .acquiring)
    if existing >= 0 { return existing }
    let event: EventFD
    do throws(Errno) { event = try EventFD() } catch {
      throw MooncakeError(.system, "event descriptor: \(error)")
    }
    let (stored, current) = engineEvent.compareExchange(
      expected: -1, desired: event.descriptor.rawValue, ordering: .acquiringAndReleasing)
    return stored ? event.keepOpen() : current
  }

  /// Calls `callback` on a thread of the engine each time the batch becomes terminal.
  package func setCallback(
    _ id: BatchID, _ callback: @escaping @Sendable (BatchID, BatchStatus) -> Void
  ) throws(MooncakeError) {
    // Reserve its thread now: when the batch ends there is no caller left to return a failure to.
    try callbacks.reserve()
    try batches.with(id) { batch throws(MooncakeError) in try batch.setCallback(callback) }
  }

  /// Submits requests, waits for them, and throws the failure of the first that did not complete.
  public func transfer(
    _ requests: UnsafeBufferPointer<TransferRequest>, timeoutMilliseconds: UInt64 = 0
  ) throws(MooncakeError) {
    try transfer(count: requests.count, timeoutMilliseconds: timeoutMilliseconds) {
      RawRequest(requests[$0])
    }
  }

  /// As above with unchecked values.
  @inline(__always)
  package func transfer(
    count: Int, timeoutMilliseconds: UInt64, request: (Int) -> RawRequest
  ) throws(MooncakeError) {
    if count == 1, try copyAtOnce(request(0)) { return }
    let batch = try takeSpareBatch(count)
    try submit(
      batch, count: count, timeoutMilliseconds: timeoutMilliseconds, notification: nil,
      isAsynchronous: false, request: request)
    _ = router.waitUntilTerminal(batch, .never)
    let status = batch.status
    let message = status.error == nil ? "" : batch.failureMessage
    giveSpareBatch(batch)
    if let code = status.error { throw MooncakeError(code, message) }
  }

  /// Moves a request of moderate size at once if its path needs no waiting for that; a batch would
  /// cost more than the copy.
  @inline(__always)
  private func copyAtOnce(_ raw: RawRequest) throws(MooncakeError) -> Bool {
    guard raw.length <= UInt64(Router.bulkBytes), raw.length > 0,
      let opcode = Opcode(rawValue: raw.opcode),
      let source = UnsafeMutableRawPointer(bitPattern: UInt(raw.source)),
      !raw.source.addingReportingOverflow(raw.length).overflow
    else { return false }
    return try router.whileOpen { () throws(MooncakeError) in
      let route = try segments.segment(raw.segment).route
      // Whether the path works it finds out itself; asking first would cost as much as the rest.
      guard let way = route.ways.first, way.traits.copiesAtOnce, route.isOpen(way) else {
        return false
      }
      _ = try local.ranges.find(raw.source, raw.length, request: 0)
      return way.path.copyAtOnce(opcode, source, raw.targetOffset, Int(raw.length))
    }
  }

  private static let spareBatchCapacity = 256

  private func takeSpareBatch(_ count: Int) throws(MooncakeError) -> Batch {
    guard count <= Self.batchCapacityLimit else {
      throw MooncakeError(.invalidArgument, "\(count) requests are more than a batch holds")
    }
    if count <= Self.spareBatchCapacity, let batch = spareBatches.withLock({ $0.popLast() }) {
      return batch
    }
    return Batch(
      capacity: max(count, Self.spareBatchCapacity), pool: router.pool, drivers: drivers,
      announcer: self)
  }

  private func giveSpareBatch(_ batch: Batch) {
    batch.waitUntilQuiet()
    if batch.capacity > Self.spareBatchCapacity { return }
    batch.reset()
    spareBatches.withLock { if $0.count < 16 { $0.append(batch) } }
  }
}
