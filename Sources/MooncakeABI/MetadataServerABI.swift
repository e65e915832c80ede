// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Section "Metadata server" of mooncake.h.
import CMooncake
import Glibc
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// The metadata servers of the process. A handle is a number that is never used twice.
private final class ServerTable: Sendable {
  static let capacity = 64

  private struct State: Sendable {
    var servers: [UInt64: MetadataServer] = [:]
    var last: UInt64 = 0
    var startingCount = 0
  }
  private let state = Lock(State())

  // Replaced only in a forked child, before it has a second thread: another thread of the parent
  // may have held the lock at the fork, and the servers' threads do not exist there.
  private(set) nonisolated(unsafe) static var shared: ServerTable = {
    pthread_atfork(nil, nil) { forget() }
    return ServerTable()
  }()

  private static func forget() {
    // Its servers must not be ended: their threads cannot be joined.
    _ = Unmanaged.passRetained(shared)
    shared = ServerTable()
    shared.state.withLock { $0.last = UInt64(getpid()) << 32 }
  }

  func start(_ options: MetadataServer.Options) throws(EngineError) -> UInt64 {
    let hasRoom = state.withLock { state in
      if state.servers.count + state.startingCount >= Self.capacity { return false }
      state.startingCount += 1
      return true
    }
    if !hasRoom {
      throw EngineError(.full, "the process has \(Self.capacity) metadata servers: stop one first")
    }
    defer { state.withLock { $0.startingCount -= 1 } }
    let server = try MetadataServer(options)
    return state.withLock { state in
      state.last += 1
      // Odd, so that it is no aligned pointer; the bits of an engine's kind are 0.
      let handle = state.last << 3 | 1
      state.servers[handle] = server
      return handle
    }
  }

  func server(_ handle: UInt64, isTaken: Bool = false) throws(EngineError) -> MetadataServer {
    let server = state.withLock { state in
      isTaken ? state.servers.removeValue(forKey: handle) : state.servers[handle]
    }
    if let server { return server }
    throw EngineError(
      .invalidHandle,
      "the handle is null, foreign, from before a fork, or of a server that was stopped")
  }
}

private let currentSize = MemoryLayout<mooncake_metadata_server_options_t>.size
/// Size of the struct in 0.1.
private let firstSize = 32
/// A larger struct_size is a mistake rather than a later version.
private let maximumSize = 4096

private func checkSize(_ size: UInt32) throws(EngineError) -> Int {
  guard size >= firstSize, size <= maximumSize else {
    throw EngineError(
      .invalidArgument,
      "struct_size is \(size): set it to sizeof(mooncake_metadata_server_options_t), which is "
        + "\(currentSize) in this version")
  }
  return Int(size)
}

private func readOptions(
  _ given: UnsafePointer<mooncake_metadata_server_options_t>?
) throws(EngineError) -> MetadataServer.Options {
  var options = MetadataServer.Options()
  guard let given else { return options }
  let bytes = UnsafeRawPointer(given)
  // The rest may not exist before its size is known.
  let size = try checkSize(bytes.loadUnaligned(as: UInt32.self))
  if size > currentSize {
    let extra = UnsafeRawBufferPointer(start: bytes + currentSize, count: size - currentSize)
    if extra.contains(where: { $0 != 0 }) {
      throw EngineError(
        .unsupported,
        "options use fields beyond the \(currentSize) bytes that this version of the library "
          + "knows: load a newer library or leave them 0")
    }
  }
  var values = mooncake_metadata_server_options_t()
  memcpy(&values, bytes, min(size, currentSize))
  guard let port = UInt16(exactly: values.port) else {
    throw EngineError(.invalidArgument, "options.port \(values.port) is beyond 65535")
  }
  options.port = port
  if let host = try optionalText(values.host, "options.host") { options.host = host }
  options.directory = try optionalText(values.directory, "options.directory")
  if values.maximum_bytes != 0 { options.maximumBytes = Int(clamping: values.maximum_bytes) }
  return options
}

/// Writes the defaults.
@c @implementation
package func mooncake_metadata_server_options_init(
  _ options: UnsafeMutablePointer<mooncake_metadata_server_options_t>?, _ struct_size: UInt32
) -> Int32 {
  nativeCall { () throws(EngineError) in
    let output = try checkOutput(options, "options")
    let size = try checkSize(struct_size)
    var values = mooncake_metadata_server_options_t()
    values.struct_size = UInt32(size)
    values.maximum_bytes = UInt64(MetadataServer.Options().maximumBytes)
    memset(output, 0, size)
    memcpy(output, &values, min(size, currentSize))
  }
}

/// Starts a server that listens.
@c @implementation
package func mooncake_metadata_server_start(
  _ options: UnsafePointer<mooncake_metadata_server_options_t>?,
  _ server: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
  nativeCall { () throws(EngineError) in
    let output = try checkOutput(server, "server")
    try refuseInsideLogCallback()
    let handle = try ServerTable.shared.start(try readOptions(options))
    output.pointee = OpaquePointer(bitPattern: UInt(handle))
  }
}

/// The URI to give to engines.
@c @implementation
package func mooncake_metadata_server_uri(
  _ server: OpaquePointer?, _ buffer: UnsafeMutablePointer<CChar>?, _ capacity: UInt64,
  _ length: UnsafeMutablePointer<UInt64>?
) -> Int32 {
  nativeCall { () throws(EngineError) in
    try refuseInsideLogCallback()
    try writeText(
      try ServerTable.shared.server(number(of: server)).uri, buffer, capacity, length)
  }
}

/// The port it listens on.
@c @implementation
package func mooncake_metadata_server_port(
  _ server: OpaquePointer?, _ port: UnsafeMutablePointer<UInt32>?
) -> Int32 {
  nativeCall { () throws(EngineError) in
    let output = try checkOutput(port, "port")
    try refuseInsideLogCallback()
    let server = try ServerTable.shared.server(number(of: server))
    output.pointee = UInt32(server.address.port ?? 0)
  }
}

/// Ends a server.
@c @implementation
package func mooncake_metadata_server_stop(_ server: OpaquePointer?) -> Int32 {
  nativeCall { () throws(EngineError) in
    try refuseInsideLogCallback()
    try ServerTable.shared.server(number(of: server), isTaken: true).stop()
  }
}
