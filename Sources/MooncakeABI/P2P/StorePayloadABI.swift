// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Sections "Offering", "Getting" and "Looking" of mooncake_store.h.
import CMooncake
import MooncakeBase
import MooncakeEngine
import MooncakeP2P

/// Writes the defaults.
@c @implementation
package func mooncake_store_register_options_init(
  _ options: UnsafeMutablePointer<mooncake_store_register_options_t>?, _ struct_size: UInt32
) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    try mooncake_store_register_options_t().write(to: options, "options", size: struct_size)
  }
}

/// Writes the defaults.
@c @implementation
package func mooncake_store_get_options_init(
  _ options: UnsafeMutablePointer<mooncake_store_get_options_t>?, _ struct_size: UInt32
) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    try mooncake_store_get_options_t().write(to: options, "options", size: struct_size)
  }
}

/// Creates a result and its handle; only runs `body` if the caller wants none.
private func writeResult(
  _ output: UnsafeMutablePointer<OpaquePointer?>?, _ body: () throws(MooncakeError) -> StoreReport
) throws(MooncakeError) {
  if let output {
    output.pointee = try HandleTable.shared.insert(body)
  } else {
    _ = try body()
  }
}

/// Offers buffers under a name.
@c @implementation
package func mooncake_store_register(
  _ store: OpaquePointer?, _ name: UnsafePointer<CChar>?,
  _ buffers: UnsafePointer<mooncake_buffer_t>?, _ count: UInt64,
  _ options: UnsafePointer<mooncake_store_register_options_t>?,
  _ operation: UnsafePointer<mooncake_store_operation_t>?,
  _ result: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
  nativeCall(store, StoreRecord.self) { record throws(MooncakeError) in
    let name = try requiredText(name, "name")
    let buffers = try readBuffers(buffers, count)
    let options = try readOptions(options)
    let operation = try readOperation(operation)
    try writeResult(result) { () throws(MooncakeError) in
      StoreReport(payloads: [try record.store.register(name, buffers, options, operation)])
    }
  }
}

/// Withdraws a payload that the store has registered.
@c @implementation
package func mooncake_store_unregister(
  _ store: OpaquePointer?, _ name: UnsafePointer<CChar>?,
  _ operation: UnsafePointer<mooncake_store_operation_t>?
) -> Int32 {
  nativeCall(store, StoreRecord.self) { record throws(MooncakeError) in
    try record.store.unregister(
      try requiredText(name, "name"), try readOperation(operation))
  }
}

/// Gets a whole payload.
@c @implementation
package func mooncake_store_get(
  _ store: OpaquePointer?, _ name: UnsafePointer<CChar>?,
  _ buffers: UnsafePointer<mooncake_buffer_t>?, _ count: UInt64,
  _ options: UnsafePointer<mooncake_store_get_options_t>?,
  _ operation: UnsafePointer<mooncake_store_operation_t>?,
  _ result: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
  nativeCall(store, StoreRecord.self) { record throws(MooncakeError) in
    let name = try requiredText(name, "name")
    let isAllocated = buffers == nil && count == 0
    let buffers = isAllocated ? nil : try readBuffers(buffers, count)
    if isAllocated && result == nil {
      throw MooncakeError(
        .invalidArgument, "buffers and result are both null: the payload could not be found")
    }
    let options = try readOptions(options)
    let operation = try readOperation(operation)
    try writeResult(result) { () throws(MooncakeError) in
      StoreReport(try record.store.get(name, into: buffers, options, operation))
    }
  }
}

/// Drops a payload that the store has fetched.
@c @implementation
package func mooncake_store_delete_replica(
  _ store: OpaquePointer?, _ name: UnsafePointer<CChar>?,
  _ operation: UnsafePointer<mooncake_store_operation_t>?
) -> Int32 {
  nativeCall(store, StoreRecord.self) { record throws(MooncakeError) in
    try record.store.deleteReplica(
      try requiredText(name, "name"), try readOperation(operation))
  }
}

/// Removes a name from every store.
@c @implementation
package func mooncake_store_remove(
  _ store: OpaquePointer?, _ name: UnsafePointer<CChar>?,
  _ operation: UnsafePointer<mooncake_store_operation_t>?
) -> Int32 {
  nativeCall(store, StoreRecord.self) { record throws(MooncakeError) in
    try record.store.remove(try requiredText(name, "name"), try readOperation(operation))
  }
}

/// Lists payloads by name prefix.
@c @implementation
package func mooncake_store_list(
  _ store: OpaquePointer?, _ prefix: UnsafePointer<CChar>?,
  _ operation: UnsafePointer<mooncake_store_operation_t>?,
  _ result: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
  nativeCall(store, StoreRecord.self) { record throws(MooncakeError) in
    let output = try checkOutput(result, "result")
    let prefix = try prefixText(prefix)
    let operation = try readOperation(operation)
    try writeResult(output) { () throws(MooncakeError) in
      StoreReport(payloads: try record.store.list(prefix: prefix, operation))
    }
  }
}

/// Finds one payload and its holders.
@c @implementation
package func mooncake_store_stat(
  _ store: OpaquePointer?, _ name: UnsafePointer<CChar>?,
  _ operation: UnsafePointer<mooncake_store_operation_t>?,
  _ result: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
  nativeCall(store, StoreRecord.self) { record throws(MooncakeError) in
    let output = try checkOutput(result, "result")
    let name = try requiredText(name, "name")
    let operation = try readOperation(operation)
    try writeResult(output) { () throws(MooncakeError) in
      let (info, holders) = try record.store.describe(name, operation)
      return StoreReport(payloads: [info], holders: holders)
    }
  }
}

/// Reads a range of a payload.
@c @implementation
package func mooncake_store_read(
  _ store: OpaquePointer?, _ name: UnsafePointer<CChar>?, _ offset: UInt64,
  _ buffer: UnsafeMutableRawPointer?, _ length: UInt64,
  _ operation: UnsafePointer<mooncake_store_operation_t>?
) -> Int32 {
  nativeCall(store, StoreRecord.self) { record throws(MooncakeError) in
    let name = try requiredText(name, "name")
    guard let buffer else { throw MooncakeError(.invalidArgument, "buffer is null") }
    try checkRange(buffer, length)
    try record.store.read(
      name, offset: offset, into: buffer, length: length, try readOperation(operation))
  }
}

/// Writes a range of a writable payload.
@c @implementation
package func mooncake_store_write(
  _ store: OpaquePointer?, _ name: UnsafePointer<CChar>?, _ offset: UInt64,
  _ data: UnsafeRawPointer?, _ length: UInt64,
  _ operation: UnsafePointer<mooncake_store_operation_t>?
) -> Int32 {
  nativeCall(store, StoreRecord.self) { record throws(MooncakeError) in
    let name = try requiredText(name, "name")
    guard let data else { throw MooncakeError(.invalidArgument, "data is null") }
    try checkRange(data, length)
    try record.store.write(
      name, offset: offset, from: data, length: length, try readOperation(operation))
  }
}
