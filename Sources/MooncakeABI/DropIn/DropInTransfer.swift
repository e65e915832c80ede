// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Sections "Transfers" and "Notifications" of transfer_engine_c.h.
import CMooncake
import Glibc
import MooncakeBase
import MooncakeEngine
import Synchronization

/// Creates a batch.
@c @implementation
package func allocateBatchID(_ engine: transfer_engine_t?, _ batch_size: Int) -> UInt64 {
  dropInValue(engine) { record throws(MooncakeError) in
    guard let capacity = Int(exactly: unsigned(batch_size)), capacity <= maximumBatchCapacity else {
      throw MooncakeError(
        .invalidArgument,
        "batch_size is \(unsigned(batch_size)), more than \(maximumBatchCapacity)")
    }
    // Mooncake allows an empty batch.
    return try record.engine.createBatch(capacity: max(1, capacity))
  } ?? INVALID_BATCH
}

/// Appends requests to a batch.
@c @implementation
package func submitTransfer(
  _ engine: transfer_engine_t?, _ batch_id: UInt64,
  _ entries: UnsafeMutablePointer<transfer_request>?, _ count: Int
) -> Int32 {
  dropInBatchCall(engine) { record throws(MooncakeError) in
    try submit(record, batch_id, entries, count, nil)
  }
}

/// As `submitTransfer`, with a notification once everything has completed.
@c @implementation
package func submitTransferWithNotify(
  _ engine: transfer_engine_t?, _ batch_id: UInt64,
  _ entries: UnsafeMutablePointer<transfer_request>?, _ count: Int, _ notify_msg: notify_msg_t
) -> Int32 {
  dropInBatchCall(engine) { record throws(MooncakeError) in
    if count == 0 {
      throw MooncakeError(
        .invalidArgument, "count is 0: the notification goes to the first entry's target")
    }
    let notification = try makeNotification(notify_msg.name, notify_msg.msg)
    try submit(record, batch_id, entries, count, notification)
  }
}

@inline(__always)
private func submit(
  _ record: EngineRecord, _ batch: UInt64, _ entries: UnsafeMutablePointer<transfer_request>?,
  _ count: Int, _ notification: Notification?
) throws(MooncakeError) {
  let count = try checkArray(
    UnsafePointer(entries), unsigned(count), "entries", limit: maximumBatchCapacity)
  if !record.dropIn.isTransportInstalled.load(ordering: .relaxed) {
    throw MooncakeError(
      .unsupported, "no transport is installed: call installTransport(engine, \"tcp\", NULL)")
  }
  try record.engine.submit(
    batch, count: count, timeoutMilliseconds: 0, notification: notification
  ) { index in
    let entry = entries! + index
    return RawRequest(
      opcode: entry.pointee.opcode, segment: entry.pointee.target_id,
      source: UInt64(UInt(bitPattern: entry.pointee.source)),
      targetOffset: entry.pointee.target_offset, length: entry.pointee.length)
  }
}

/// Reads the status of one request.
@c @implementation
package func getTransferStatus(
  _ engine: transfer_engine_t?, _ batch_id: UInt64, _ task_id: Int,
  _ status: UnsafeMutablePointer<transfer_status>?
) -> Int32 {
  // Programs read the status without checking the code, and must not find an old status there.
  status?.pointee = transfer_status(status: STATUS_FAILED, transferred_bytes: 0)
  return dropInBatchCall(engine) { record throws(MooncakeError) in
    let output = try checkOutput(status, "status")
    let seen = try record.engine.poll(batch_id, request: Int(clamping: unsigned(task_id)))
    explain(seen.state, batch_id, record.engine, "getTransferStatus")
    output.pointee = transfer_status(
      status: dropInStatus(seen.state), transferred_bytes: seen.transferredBytes)
  }
}

/// Programs know only two final states; any other they wait on forever or take for success.
@inline(__always)
private func dropInStatus(_ state: TransferState) -> Int32 {
  switch state {
  case .waiting: STATUS_WAITING
  case .completed: STATUS_COMPLETED
  case .canceled, .timeout, .failed: STATUS_FAILED
  }
}

/// Frees a batch.
@c @implementation
package func freeBatchID(_ engine: transfer_engine_t?, _ batch_id: UInt64) -> Int32 {
  dropInBatchCall(engine) { record throws(MooncakeError) in
    try record.engine.freeBatch(batch_id)
  }
}

// MARK: - Notifications

/// Takes all notifications received.
@c @implementation
package func getNotifsFromEngine(
  _ engine: transfer_engine_t?, _ size: UnsafeMutablePointer<Int32>?
) -> UnsafeMutablePointer<notify_msg_t>? {
  size?.pointee = 0
  return dropInValue(engine) { record throws(MooncakeError) in
    let size = try checkOutput(size, "size")
    var received: [Notification] = []
    // Bounded, because steady senders could otherwise keep this call going.
    while received.count < 1 << 16, let next = record.engine.receiveNotification() {
      received.append(next)
    }
    if received.isEmpty { return nil }
    let array = try copyOut(received)
    size.pointee = Int32(received.count)
    return array
  }
}

/// Frees what `getNotifsFromEngine` returned.
@c @implementation
package func freeNotifsMsgBuf(_ msg: UnsafeMutablePointer<notify_msg_t>?, _ size: Int32) -> Int32 {
  guard let msg else { return 0 }
  for index in 0..<Int(max(0, size)) {
    free(msg[index].name)
    free(msg[index].msg)
  }
  free(msg)
  return 0
}

/// Delivers a notification to the owner of a segment.
@c @implementation
package func genNotifyInEngine(
  _ engine: transfer_engine_t?, _ target_id: UInt64, _ notify_msg: notify_msg_t
) -> Int32 {
  dropInCall(engine) { record throws(MooncakeError) in
    let notification = try makeNotification(notify_msg.name, notify_msg.msg)
    guard let segment = Int32(exactly: target_id) else {
      throw MooncakeError(.notFound, "segment \(target_id) is not open")
    }
    do throws(MooncakeError) {
      try record.engine.notify(segment, notification)
      return 0
    } catch {
      // Mooncake reports an unknown id and a peer that refuses the message as metadata errors.
      switch error.code {
      case .invalidHandle, .full: throw MooncakeError(.notFound, error.message)
      default: throw error
      }
    }
  }
}

private func copyOut(
  _ notifications: [Notification]
) throws(MooncakeError) -> UnsafeMutablePointer<notify_msg_t> {
  let size = notifications.count * MemoryLayout<notify_msg_t>.stride
  guard let block = malloc(size) else {
    throw MooncakeError(
      .outOfMemory, "no memory for \(notifications.count) notifications: all lost")
  }
  let array = block.bindMemory(to: notify_msg_t.self, capacity: notifications.count)
  for (index, notification) in notifications.enumerated() {
    let name = copyOut(notification.name)
    let message = copyOut(notification.message)
    (array + index).initialize(to: notify_msg_t(name: name, msg: message))
    if name == nil || message == nil {
      _ = freeNotifsMsgBuf(array, Int32(index + 1))
      throw MooncakeError(
        .outOfMemory, "no memory for \(notifications.count) notifications: all lost")
    }
  }
  return array
}

private func copyOut(_ text: String) -> UnsafeMutablePointer<CChar>? {
  let size = text.utf8.count + 1
  guard let block = malloc(size) else { return nil }
  let copy = block.assumingMemoryBound(to: CChar.self)
  writePrefix(of: text, copy, size)
  return copy
}
