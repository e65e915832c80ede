// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Section "Memory" of mooncake.h.
import CMooncake
import MooncakeBase
import MooncakeEngine

/// A buffer in the engine's lists; has the layout of `mooncake_buffer_t` and `buffer_entry_t`.
typealias BufferEntry = (address: UInt64, length: UInt64)

/// Registers one buffer.
@c @implementation
package func mooncake_memory_register(
  _ engine: OpaquePointer?, _ address: UnsafeMutableRawPointer?, _ length: UInt64,
  _ location: UnsafePointer<CChar>?, _ access: UInt32
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let address = try checkAddress(address)
    try engine.register(
      address, length: length, location: try optionalText(location, "location") ?? "*",
      access: try checkAccess(access))
  }
}

/// Ends one registration.
@c @implementation
package func mooncake_memory_unregister(
  _ engine: OpaquePointer?, _ address: UnsafeMutableRawPointer?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    try engine.unregister(try checkAddress(address))
  }
}

/// Registers all buffers or none.
@c @implementation
package func mooncake_memory_register_batch(
  _ engine: OpaquePointer?, _ buffers: UnsafePointer<mooncake_buffer_t>?, _ count: UInt64,
  _ location: UnsafePointer<CChar>?, _ access: UInt32
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let count = try checkArray(buffers, count, "buffers")
    let location = try optionalText(location, "location") ?? "*"
    let access = try checkAccess(access)
    if count == 0 { return }
    let entries = UnsafeRawPointer(buffers!).assumingMemoryBound(to: BufferEntry.self)
    try engine.register(
      UnsafeBufferPointer(start: entries, count: count), location: location, access: access)
  }
}

/// Ends registrations; continues after one that does not exist.
@c @implementation
package func mooncake_memory_unregister_batch(
  _ engine: OpaquePointer?, _ addresses: UnsafePointer<UnsafeMutableRawPointer?>?, _ count: UInt64
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let count = try checkArray(addresses, count, "addresses")
    if count == 0 { return }
    let numbers = UnsafeRawPointer(addresses!).assumingMemoryBound(to: UInt64.self)
    try engine.unregister(UnsafeBufferPointer(start: numbers, count: count))
  }
}

/// Allocates registered memory.
@c @implementation
package func mooncake_memory_allocate(
  _ engine: OpaquePointer?, _ length: UInt64, _ location: UnsafePointer<CChar>?, _ access: UInt32,
  _ address: UnsafeMutablePointer<UnsafeMutableRawPointer?>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let output = try checkOutput(address, "address")
    if length == 0 { throw MooncakeError(.invalidArgument, "length is 0") }
    // No address space holds more, and sizes stay clear of the sign bit.
    if length > 1 << 62 {
      throw MooncakeError(.outOfMemory, "\(length) bytes are more than any address space holds")
    }
    output.pointee = try engine.allocate(
      length: length, location: try optionalText(location, "location") ?? "*",
      access: try checkAccess(access))
  }
}

/// Frees memory of `mooncake_memory_allocate`.
@c @implementation
package func mooncake_memory_free(
  _ engine: OpaquePointer?, _ address: UnsafeMutableRawPointer?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    try engine.free(try checkAddress(address))
  }
}

/// An address that is not null.
func checkAddress(
  _ address: UnsafeMutableRawPointer?
) throws(MooncakeError) -> UnsafeMutableRawPointer {
  guard let address else { throw MooncakeError(.invalidArgument, "address is null") }
  return address
}
