// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Section "Metadata server" of mooncake.h.
import CMooncake
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

extension MetadataServer: HandleObject {
  static var noun: StaticString { "a metadata server" }
  static var capacity: Int { 64 }
}

extension mooncake_metadata_server_options_t: SizedStruct {
  static var typeName: StaticString { "mooncake_metadata_server_options_t" }
  static var firstSize: Int { 32 }
}

private func readOptions(
  _ given: UnsafePointer<mooncake_metadata_server_options_t>?
) throws(MooncakeError) -> MetadataServer.Options {
  let values = try mooncake_metadata_server_options_t.read(given)
  var options = MetadataServer.Options()
  guard let port = UInt16(exactly: values.port) else {
    throw MooncakeError(.invalidArgument, "options.port \(values.port) is above 65535")
  }
  options.port = port
  if let host = try optionalText(values.host, "options.host") { options.host = host }
  options.directory = try optionalText(values.directory, "options.directory")
  options.token = try optionalText(values.token, "options.token")
  if values.maximum_bytes != 0 { options.maximumBytes = Int(clamping: values.maximum_bytes) }
  return options
}

/// Writes the defaults.
@c @implementation
package func mooncake_metadata_server_options_init(
  _ options: UnsafeMutablePointer<mooncake_metadata_server_options_t>?, _ struct_size: UInt32
) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    var values = mooncake_metadata_server_options_t()
    values.maximum_bytes = UInt64(MetadataServer.Options().maximumBytes)
    try values.write(to: options, "options", size: struct_size)
  }
}

/// Starts a server; it listens when this returns.
@c @implementation
package func mooncake_metadata_server_start(
  _ options: UnsafePointer<mooncake_metadata_server_options_t>?,
  _ server: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    let output = try checkOutput(server, "server")
    try refuseInsideLogCallback()
    let options = try readOptions(options)
    output.pointee = try HandleTable.shared.insert { () throws(MooncakeError) in
      try MetadataServer(options)
    }
  }
}

/// The URI to give to engines.
@c @implementation
package func mooncake_metadata_server_uri(
  _ server: OpaquePointer?, _ buffer: UnsafeMutablePointer<CChar>?, _ capacity: UInt64,
  _ length: UnsafeMutablePointer<UInt64>?
) -> Int32 {
  nativeCall(server, MetadataServer.self) { server throws(MooncakeError) in
    try writeText(server.uri, buffer, capacity, length)
  }
}

/// The port it listens on.
@c @implementation
package func mooncake_metadata_server_port(
  _ server: OpaquePointer?, _ port: UnsafeMutablePointer<UInt32>?
) -> Int32 {
  nativeCall(server, MetadataServer.self) { server throws(MooncakeError) in
    let output = try checkOutput(port, "port")
    output.pointee = UInt32(server.address.port ?? 0)
  }
}

/// Ends a server.
@c @implementation
package func mooncake_metadata_server_stop(_ server: OpaquePointer?) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    try HandleTable.shared.remove(server, MetadataServer.self) { $0.stop() }
  }
}
