// Reads the structs and arrays that the store's functions take, and checks them before use.
import CMooncake
import MooncakeBase
import MooncakeEngine
import MooncakeP2P

extension mooncake_store_options_t: SizedStruct {
  static var typeName: StaticString { "mooncake_store_options_t" }
  static var firstSize: Int { 24 }
}

extension mooncake_store_operation_t: SizedStruct {
  static var typeName: StaticString { "mooncake_store_operation_t" }
  static var firstSize: Int { 40 }
}

extension mooncake_store_register_options_t: SizedStruct {
  static var typeName: StaticString { "mooncake_store_register_options_t" }
  static var firstSize: Int { 32 }
}

extension mooncake_store_get_options_t: SizedStruct {
  static var typeName: StaticString { "mooncake_store_get_options_t" }
  static var firstSize: Int { 32 }
}

/// Reads the options of a store.
func readOptions(
  _ given: UnsafePointer<mooncake_store_options_t>?
) throws(MooncakeError) -> P2PStore.Options {
  let values = try mooncake_store_options_t.read(given)
  try checkReserved(values.reserved, "options.reserved")
  var options = P2PStore.Options()
  options.metadataURI = try optionalText(values.metadata_uri, "options.metadata_uri")
  if values.drain_ms != 0 { options.drainMilliseconds = values.drain_ms }
  return options
}

/// Reads the options of a registration.
func readOptions(
  _ given: UnsafePointer<mooncake_store_register_options_t>?
) throws(MooncakeError) -> RegisterOptions {
  let values = try mooncake_store_register_options_t.read(given)
  try checkReserved(values.reserved, "options.reserved")
  var options = RegisterOptions()
  options.shardBytes = values.shard_bytes
  options.isCreateOnly = try checkFlag(values.create_only, "options.create_only")
  options.isWritable = try checkFlag(values.writable, "options.writable")
  options.location = try optionalText(values.location, "options.location") ?? options.location
  return options
}

/// Reads the options of a get.
func readOptions(
  _ given: UnsafePointer<mooncake_store_get_options_t>?
) throws(MooncakeError) -> GetOptions {
  let values = try mooncake_store_get_options_t.read(given)
  try checkReserved(values.reserved, "options.reserved")
  var options = GetOptions()
  options.followsVersions = try checkFlag(values.follow_versions, "options.follow_versions")
  options.sharesOnward = !(try checkFlag(values.receive_only, "options.receive_only"))
  options.location = try optionalText(values.location, "options.location") ?? options.location
  if let text = try optionalText(values.version, "options.version") {
    guard let version = PayloadVersion(text) else {
      throw MooncakeError(
        .invalidArgument, "options.version '\(text)' is not 32 hexadecimal digits")
    }
    options.version = version
  }
  return options
}

/// A progress callback of the host with its context pointer.
private struct HostProgress: @unchecked Sendable {
  // Unchecked: it is called only on the thread that called the operation.
  let callback: mooncake_store_progress_callback_t
  let context: UnsafeMutableRawPointer?

  func call(_ progress: StoreProgress) -> Bool {
    var values = mooncake_store_progress_t(
      phase: progress.phase.rawValue, reserved: 0, done_bytes: progress.doneBytes,
      total_bytes: progress.totalBytes,
      active_holder_count: UInt64(clamping: progress.activeHolderCount),
      holder_count: UInt64(clamping: progress.holderCount))
    return ThreadState.duringCallback { callback(&values, context) == 0 }
  }
}

/// Reads an operation's deadline, cancellation and progress callback.
func readOperation(
  _ given: UnsafePointer<mooncake_store_operation_t>?
) throws(MooncakeError) -> StoreOperation {
  let values = try mooncake_store_operation_t.read(given)
  try checkReserved(values.reserved, "operation.reserved")
  var operation = StoreOperation(timeoutMilliseconds: values.timeout_ms)
  if let cancellation = values.cancellation {
    operation.cancellation = try HandleTable.shared.with(cancellation, Cancellation.self) {
      (cancellation) throws(MooncakeError) in cancellation
    }
  }
  if let callback = values.progress {
    let host = HostProgress(callback: callback, context: values.context)
    operation.progress = { host.call($0) }
  }
  return operation
}

/// Copies a list of buffers and checks that each could be real memory.
func readBuffers(
  _ buffers: UnsafePointer<mooncake_buffer_t>?, _ count: UInt64
) throws(MooncakeError) -> [PayloadBuffer] {
  let count = try checkArray(buffers, count, "buffers", limit: maximumBufferCount)
  guard let buffers, count > 0 else {
    throw MooncakeError(.invalidArgument, "count is 0: a payload has at least one buffer")
  }
  var total: UInt64 = 0
  var result: [PayloadBuffer] = []
  for (index, buffer) in UnsafeBufferPointer(start: buffers, count: count).enumerated() {
    guard let address = buffer.address, buffer.length > 0 else {
      throw MooncakeError(.invalidArgument, "buffers[\(index)] is null or empty")
    }
    try checkRange(address, buffer.length)
    total &+= buffer.length
    // Each is below 1 << 63, so a sum that is too large is noticed before it wraps.
    if total >> 62 != 0 {
      throw MooncakeError(.invalidArgument, "the buffers are longer than any memory")
    }
    result.append(PayloadBuffer(address: address, length: buffer.length))
  }
  return result
}

/// Most buffers in a payload.
private let maximumBufferCount = 65_536

/// Checks that a range could be memory of this process.
func checkRange(_ address: UnsafeRawPointer, _ length: UInt64) throws(MooncakeError) {
  let start = UInt64(UInt(bitPattern: address))
  if length >> 62 != 0 || start.addingReportingOverflow(length).overflow {
    throw MooncakeError(
      .invalidArgument, "\(length) bytes at 0x\(String(start, radix: 16)) exceed the address space")
  }
}

/// Copies a prefix of names, which may be null or empty.
func prefixText(_ prefix: UnsafePointer<CChar>?) throws(MooncakeError) -> String {
  if prefix == nil { return "" }
  return try messageText(prefix, "prefix", maximum: maximumNameBytes)
}
