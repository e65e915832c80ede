// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Sections "Memory" and "Segments" of transfer_engine_c.h.
import CMooncake
import MooncakeBase
import MooncakeEngine

private let bothRights: Access = [.remoteRead, .remoteWrite]

/// Registers one range.
@c @implementation
package func registerLocalMemory(
  _ engine: transfer_engine_t?, _ addr: UnsafeMutableRawPointer?, _ length: Int,
  _ location: UnsafePointer<CChar>?, _ remote_accessible: Int32
) -> Int32 {
  dropInCall(engine) { record throws(MooncakeError) in
    try record.engine.register(
      try checkAddress(addr), length: unsigned(length), location: try locationText(location),
      access: remote_accessible == 0 ? .local : bothRights)
    return 0
  }
}

/// Ends one registration.
@c @implementation
package func unregisterLocalMemory(
  _ engine: transfer_engine_t?, _ addr: UnsafeMutableRawPointer?
) -> Int32 {
  dropInCall(engine) { record throws(MooncakeError) in
    guard let addr else { throw MooncakeError(.notRegistered, "addr is null") }
    try record.engine.unregister(addr)
    return 0
  }
}

/// Registers all ranges or none.
@c @implementation
package func registerLocalMemoryBatch(
  _ engine: transfer_engine_t?, _ buffer_list: UnsafeMutablePointer<buffer_entry_t>?,
  _ buffer_len: Int, _ location: UnsafePointer<CChar>?
) -> Int32 {
  dropInCall(engine) { record throws(MooncakeError) in
    let count = try checkArray(
      UnsafePointer(buffer_list), unsigned(buffer_len), "buffer_list")
    let location = try locationText(location)
    if count == 0 { return 0 }
    let entries = UnsafeRawPointer(buffer_list!).assumingMemoryBound(to: BufferEntry.self)
    try record.engine.register(
      UnsafeBufferPointer(start: entries, count: count), location: location, access: bothRights)
    return 0
  }
}

/// Ends registrations; continues after one that does not exist.
@c @implementation
package func unregisterLocalMemoryBatch(
  _ engine: transfer_engine_t?, _ addr_list: UnsafeMutablePointer<UnsafeMutableRawPointer?>?,
  _ addr_len: Int
) -> Int32 {
  dropInCall(engine) { record throws(MooncakeError) in
    let count = try checkArray(UnsafePointer(addr_list), unsigned(addr_len), "addr_list")
    if count == 0 { return 0 }
    let numbers = UnsafeRawPointer(addr_list!).assumingMemoryBound(to: UInt64.self)
    try record.engine.unregister(UnsafeBufferPointer(start: numbers, count: count))
    return 0
  }
}

/// Mooncake gives an empty location no meaning, so it counts as none.
private func locationText(_ location: UnsafePointer<CChar>?) throws(MooncakeError) -> String {
  guard let location, location.pointee != 0 else { return "*" }
  return try requiredText(location, "location")
}

// MARK: - Segments

/// Opens a segment, from the cache if it is there.
@c @implementation
package func openSegment(
  _ engine: transfer_engine_t?, _ segment_name: UnsafePointer<CChar>?
) -> Int32 {
  dropInSegment(engine) { record throws(MooncakeError) in
    let name = try segmentName(segment_name)
    if record.engine.isOwn(name) { return LOCAL_SEGMENT }
    if let id = record.engine.cachedSegment(name) { return id }
    return try record.engine.openSegment(name)
  }
}

/// Opens a segment and fetches its descriptor even if it is in the cache.
@c @implementation
package func openSegmentNoCache(
  _ engine: transfer_engine_t?, _ segment_name: UnsafePointer<CChar>?
) -> Int32 {
  dropInSegment(engine) { record throws(MooncakeError) in
    let engine = record.engine
    let name = try segmentName(segment_name)
    if engine.isOwn(name) { return LOCAL_SEGMENT }
    guard let id = engine.cachedSegment(name) else { return try engine.openSegment(name) }
    do throws(MooncakeError) {
      let again = try engine.openSegment(name)
      // Each name counts as opened once, however often it is opened.
      try engine.closeSegment(again)
      return again
    } catch {
      Log.warning("openSegmentNoCache: \(error.message); the cached descriptor stays")
      return id
    }
  }
}

/// Does nothing: ids stay valid until the engine ends.
@c @implementation
package func closeSegment(_ engine: transfer_engine_t?, _ segment_id: Int32) -> Int32 {
  dropInCall(engine) { _ throws(MooncakeError) in 0 }
}

/// Does nothing: there is no EFA transport.
@c @implementation
package func warmupEfaSegment(
  _ engine: transfer_engine_t?, _ segment_name: UnsafePointer<CChar>?
) -> Int32 {
  dropInCall(engine) { _ throws(MooncakeError) in 0 }
}

/// Forgets a remote segment.
@c @implementation
package func removeLocalSegment(
  _ engine: transfer_engine_t?, _ segment_name: UnsafePointer<CChar>?
) -> Int32 {
  dropInCall(engine) { record throws(MooncakeError) in
    let name = try segmentName(segment_name)
    if record.engine.isOwn(name) { return 0 }
    // Racing first opens count more than once, so close repeatedly; bounded, so that a racing
    // opener cannot hold this call.
    for _ in 0..<1024 {
      guard let id = record.engine.cachedSegment(name) else { return 0 }
      do throws(MooncakeError) {
        try record.engine.closeSegment(id)
      } catch {
        return 0
      }
    }
    return 0
  }
}

/// Fetches the descriptor of every open segment again.
@c @implementation
package func syncSegmentCache(_ engine: transfer_engine_t?) -> Int32 {
  dropInCall(engine) { record throws(MooncakeError) in
    record.engine.refreshAllSegments()
    return 0
  }
}

private func segmentName(_ text: UnsafePointer<CChar>?) throws(MooncakeError) -> String {
  let name = String(try requiredText(text, "segment_name").drop { $0 == "/" })
  if name.isEmpty { throw MooncakeError(.invalidArgument, "segment_name is empty") }
  return name
}
