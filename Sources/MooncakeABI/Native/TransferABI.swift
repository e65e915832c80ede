// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Section "Transfers" of mooncake.h. Submit, poll and wait allocate nothing unless they fail.
import CMooncake
import MooncakeBase
import MooncakeEngine

/// Creates a batch.
@c @implementation
package func mooncake_batch_create(
  _ engine: OpaquePointer?, _ capacity: UInt64, _ batch: UnsafeMutablePointer<mooncake_batch_t>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let output = try checkOutput(batch, "batch")
    if capacity == 0 || capacity > UInt64(maximumBatchCapacity) {
      throw MooncakeError(
        .invalidArgument, "capacity is \(capacity), not from 1 to \(maximumBatchCapacity)")
    }
    output.pointee = try engine.createBatch(capacity: Int(capacity))
  }
}

/// Appends requests to a batch.
@c @implementation
package func mooncake_batch_submit(
  _ engine: OpaquePointer?, _ batch: mooncake_batch_t,
  _ requests: UnsafePointer<mooncake_transfer_request_t>?, _ count: UInt64, _ timeout_ms: UInt64
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let count = try checkArray(requests, count, "requests", limit: maximumBatchCapacity)
    try engine.submit(
      batch, count: count, timeoutMilliseconds: timeout_ms, notification: nil
    ) { index in RawRequest(requests! + index) }
  }
}

/// As `mooncake_batch_submit`, with a notification once everything has completed.
@c @implementation
package func mooncake_batch_submit_notify(
  _ engine: OpaquePointer?, _ batch: mooncake_batch_t,
  _ requests: UnsafePointer<mooncake_transfer_request_t>?, _ count: UInt64, _ timeout_ms: UInt64,
  _ name: UnsafePointer<CChar>?, _ message: UnsafePointer<CChar>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let count = try checkArray(requests, count, "requests", limit: maximumBatchCapacity)
    if count == 0 {
      throw MooncakeError(
        .invalidArgument, "count is 0: the notification goes to the first request's segment")
    }
    let notification = try makeNotification(name, message)
    try engine.submit(
      batch, count: count, timeoutMilliseconds: timeout_ms, notification: notification
    ) { index in RawRequest(requests! + index) }
  }
}

/// Reads the status of a batch.
@c @implementation
package func mooncake_batch_poll(
  _ engine: OpaquePointer?, _ batch: mooncake_batch_t,
  _ status: UnsafeMutablePointer<mooncake_batch_status_t>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let output = try checkOutput(status, "status")
    let seen = try engine.poll(batch)
    explain(seen.state, batch, engine, "mooncake_batch_poll")
    output.pointee = mooncake_batch_status_t(seen)
  }
}

/// Reads the status of one request.
@c @implementation
package func mooncake_batch_poll_request(
  _ engine: OpaquePointer?, _ batch: mooncake_batch_t, _ index: UInt64,
  _ status: UnsafeMutablePointer<mooncake_transfer_status_t>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let output = try checkOutput(status, "status")
    let seen = try engine.poll(batch, request: Int(clamping: index))
    explain(seen.state, batch, engine, "mooncake_batch_poll_request")
    output.pointee = mooncake_transfer_status_t(
      state: seen.state.rawValue, error: seen.error?.rawValue ?? 0,
      transferred_bytes: seen.transferredBytes)
  }
}

/// Waits until every request is terminal.
@c @implementation
package func mooncake_batch_wait(
  _ engine: OpaquePointer?, _ batch: mooncake_batch_t, _ timeout_ms: UInt64,
  _ status: UnsafeMutablePointer<mooncake_batch_status_t>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let seen = try engine.wait(batch, timeoutMilliseconds: timeout_ms)
    explain(seen.state, batch, engine, "mooncake_batch_wait")
    status?.pointee = mooncake_batch_status_t(seen)
  }
}

/// Cancels every request that is not terminal.
@c @implementation
package func mooncake_batch_cancel(_ engine: OpaquePointer?, _ batch: mooncake_batch_t) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in try engine.cancel(batch) }
}

/// Frees a batch.
@c @implementation
package func mooncake_batch_free(_ engine: OpaquePointer?, _ batch: mooncake_batch_t) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in try engine.freeBatch(batch) }
}

/// A descriptor that is readable while a batch is terminal.
@c @implementation
package func mooncake_batch_event_fd(
  _ engine: OpaquePointer?, _ batch: mooncake_batch_t, _ fd: UnsafeMutablePointer<Int32>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let output = try checkOutput(fd, "fd")
    output.pointee = try engine.eventDescriptor(of: batch)
  }
}

/// A callback of the host with its context pointer.
private struct HostBatchCallback: @unchecked Sendable {
  // Unchecked: the host must be able to use its context on the library's thread.
  let callback: mooncake_batch_callback_t
  let context: UnsafeMutableRawPointer?
}

/// Sets the callback for each time a batch becomes terminal.
@c @implementation
package func mooncake_batch_set_callback(
  _ engine: OpaquePointer?, _ batch: mooncake_batch_t, _ callback: mooncake_batch_callback_t?,
  _ context: UnsafeMutableRawPointer?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    guard let callback else {
      // Report an unknown batch first.
      _ = try engine.poll(batch)
      throw MooncakeError(.invalidArgument, "callback is null")
    }
    let host = HostBatchCallback(callback: callback, context: context)
    try engine.setCallback(batch) { batch, status in
      var status = mooncake_batch_status_t(status)
      ThreadState.duringCallback { host.callback(batch, &status, host.context) }
    }
  }
}

/// Submits requests and waits for them.
@c @implementation
package func mooncake_transfer_sync(
  _ engine: OpaquePointer?, _ requests: UnsafePointer<mooncake_transfer_request_t>?,
  _ count: UInt64, _ timeout_ms: UInt64
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let count = try checkArray(requests, count, "requests", limit: maximumBatchCapacity)
    try engine.transfer(count: count, timeoutMilliseconds: timeout_ms) { index in
      RawRequest(requests! + index)
    }
  }
}

/// Most requests in one batch.
let maximumBatchCapacity = 1 << 20

/// Sets the thread's message to the reason why transfers failed, if they did.
@inline(__always)
func explain(
  _ state: TransferState, _ batch: UInt64, _ engine: TransferEngine, _ function: StaticString
) {
  if state == .waiting || state == .completed { return }
  explainFailure(batch, engine, function)
}

@inline(never)
private func explainFailure(_ batch: UInt64, _ engine: TransferEngine, _ function: StaticString) {
  ThreadState.setMessage(function, engine.failureMessage(of: batch))
}

extension RawRequest {
  @inline(__always)
  fileprivate init(_ request: UnsafePointer<mooncake_transfer_request_t>) {
    self.init(
      opcode: request.pointee.opcode, segment: request.pointee.segment,
      source: UInt64(UInt(bitPattern: request.pointee.source)),
      targetOffset: request.pointee.target_offset, length: request.pointee.length)
  }
}

extension mooncake_batch_status_t {
  @inline(__always)
  fileprivate init(_ status: BatchStatus) {
    self.init(
      state: status.state.rawValue, error: status.error?.rawValue ?? 0,
      submitted_count: status.submittedCount, completed_count: status.completedCount,
      terminal_count: status.terminalCount, transferred_bytes: status.transferredBytes)
  }
}
