// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Section "Engine" of mooncake.h.
import CMooncake
import MooncakeBase
import MooncakeEngine

/// Writes the defaults.
@c @implementation
package func mooncake_engine_options_init(
  _ options: UnsafeMutablePointer<mooncake_engine_options_t>?, _ struct_size: UInt32
) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    try writeDefaultOptions(options, size: struct_size)
  }
}

/// Creates an engine; its ports listen when this returns.
@c @implementation
package func mooncake_engine_create(
  _ options: UnsafePointer<mooncake_engine_options_t>?,
  _ engine: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    let output = try checkOutput(engine, "engine")
    try refuseInsideLogCallback()
    let options = try readOptions(options)
    let handle = try EngineTable.shared.insert(.native) { () throws(MooncakeError) in
      do throws(MooncakeError) {
        return try TransferEngine(options)
      } catch {
        Log.error("mooncake_engine_create: \(error.message)")
        throw error
      }
    }
    output.pointee = OpaquePointer(bitPattern: UInt(handle))
  }
}

/// Ends an engine.
@c @implementation
package func mooncake_engine_destroy(_ engine: OpaquePointer?) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    try refuseInsideCallback()
    try EngineTable.shared.destroy(number(of: engine), .native)
  }
}

/// The name under which peers open the engine.
@c @implementation
package func mooncake_engine_name(
  _ engine: OpaquePointer?, _ buffer: UnsafeMutablePointer<CChar>?, _ capacity: UInt64,
  _ length: UnsafeMutablePointer<UInt64>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    try writeText(engine.name, buffer, capacity, length)
  }
}

/// Counters and gauges as Prometheus text.
@c @implementation
package func mooncake_engine_metrics(
  _ engine: OpaquePointer?, _ buffer: UnsafeMutablePointer<CChar>?, _ capacity: UInt64,
  _ length: UnsafeMutablePointer<UInt64>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    try writeText(engine.metrics(), buffer, capacity, length)
  }
}

/// A descriptor that becomes readable when a batch becomes terminal.
@c @implementation
package func mooncake_engine_event_fd(
  _ engine: OpaquePointer?, _ fd: UnsafeMutablePointer<Int32>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let output = try checkOutput(fd, "fd")
    output.pointee = try engine.eventDescriptor()
  }
}
