// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Section "Segments" of mooncake.h.
import CMooncake
import MooncakeBase
import MooncakeEngine

/// Finds a peer and fetches its descriptor.
@c @implementation
package func mooncake_segment_open(
  _ engine: OpaquePointer?, _ name: UnsafePointer<CChar>?, _ timeout_ms: UInt64,
  _ segment: UnsafeMutablePointer<mooncake_segment_t>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let output = try checkOutput(segment, "segment")
    output.pointee = try engine.openSegment(
      try requiredText(name, "name"), timeoutMilliseconds: timeout_ms)
  }
}

/// Closes a segment.
@c @implementation
package func mooncake_segment_close(
  _ engine: OpaquePointer?, _ segment: mooncake_segment_t
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in try engine.closeSegment(segment) }
}

/// Lists a segment's buffers.
@c @implementation
package func mooncake_segment_buffers(
  _ engine: OpaquePointer?, _ segment: mooncake_segment_t,
  _ buffers: UnsafeMutablePointer<mooncake_remote_buffer_t>?, _ capacity: UInt64,
  _ count: UnsafeMutablePointer<UInt64>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let output = try checkOutput(count, "count")
    if buffers == nil && capacity > 0 {
      throw MooncakeError(.invalidArgument, "buffers is null but capacity is \(capacity)")
    }
    let all = try engine.descriptor(of: segment).buffers
    output.pointee = UInt64(all.count)
    if let buffers {
      for (index, buffer) in all.prefix(Int(clamping: capacity)).enumerated() {
        buffers[index] = mooncake_remote_buffer_t(
          address: buffer.address, length: buffer.length, access: buffer.access.rawValue,
          reserved: 0)
      }
    }
    if UInt64(all.count) > capacity {
      throw MooncakeError(.full, "the segment has \(all.count) buffers, not \(capacity)")
    }
  }
}

/// A segment's descriptor as JSON.
@c @implementation
package func mooncake_segment_describe(
  _ engine: OpaquePointer?, _ segment: mooncake_segment_t, _ buffer: UnsafeMutablePointer<CChar>?,
  _ capacity: UInt64, _ length: UnsafeMutablePointer<UInt64>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let descriptor = try engine.descriptor(of: segment).json()
    var writer = JSONWriter()
    writer.beginArray()
    for path in try engine.paths(to: segment) {
      writer.beginObject()
      writer.member("transport", path.transport)
      if !path.description.isEmpty { writer.member("path", path.description) }
      writer.member("state", path.state)
      writer.member("moved_bytes", path.movedBytes)
      writer.member("failures", path.failureCount)
      if !path.reason.isEmpty { writer.member("reason", path.reason) }
      writer.endObject()
    }
    writer.endArray()
    let text = "\(descriptor.dropLast()),\"mooncake_paths\":\(writer.text)}"
    try writeText(text, buffer, capacity, length)
  }
}

/// Asks a peer for a sign of life.
@c @implementation
package func mooncake_peer_probe(
  _ engine: OpaquePointer?, _ name: UnsafePointer<CChar>?, _ timeout_ms: UInt64
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    try engine.probe(try requiredText(name, "name"), timeoutMilliseconds: timeout_ms)
  }
}
