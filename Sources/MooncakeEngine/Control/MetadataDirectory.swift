import MooncakeBase
import MooncakeMetadata
import MooncakeSystem

/// Keys and texts in a metadata service, in the form that all processes sharing it use.
package final class MetadataDirectory: Sendable {
  package let store: any MetadataService
  package let settings: MetadataSettings
  /// Prefix of every key: "mooncake/", plus the cluster if there is one.
  package let prefix: String

  /// Longest name of a segment, in bytes.
  package static let maximumNameBytes = 1024

  package init(
    _ uri: MetadataURI, settings: MetadataSettings = .fromEnvironment()
  ) throws(MooncakeError) {
    store = try MetadataServices.open(uri, settings: settings)
    self.settings = settings
    prefix = Self.prefix(cluster: settings.clusterID)
  }

  /// "mooncake/" or "mooncake/CLUSTER/".
  package static func prefix(cluster: String) -> String {
    if cluster.isEmpty { return "mooncake/" }
    return "mooncake/\(cluster)\(cluster.utf8.last == UInt8(ascii: "/") ? "" : "/")"
  }

  /// Names with a slash already contain their folder.
  package func segmentKey(_ name: String) -> String {
    prefix + (name.utf8.contains(UInt8(ascii: "/")) ? "" : "ram/") + name
  }

  package func routeKey(_ name: String) -> String { prefix + "rpc_meta/" + name }

  /// Refuses names that cannot be part of a key.
  package static func check(_ name: String) throws(MooncakeError) {
    let reason =
      name.isEmpty
      ? "is empty"
      : name.utf8.count > maximumNameBytes
        ? "is longer than \(maximumNameBytes) bytes"
        : name.utf8.first == UInt8(ascii: "/")
          ? "begins with a slash"
          : name.utf8.contains { $0 < 0x20 || $0 == 0x7F } ? "has a control character" : nil
    guard let reason else { return }
    throw MooncakeError(
      .invalidArgument,
      "segment name \(String(reflecting: String(name.prefix(100)))) \(reason): it is part of a key "
        + "in the metadata service")
  }

  /// The descriptor that a process has published.
  package func descriptor(
    of name: String, _ call: Call
  ) throws(MooncakeError) -> SegmentDescriptor {
    try Self.check(name)
    let key = segmentKey(name)
    guard let text = try store.get(key, call) else { throw missing(key, "segment \(name)") }
    var descriptor: SegmentDescriptor
    do throws(MooncakeError) {
      descriptor = try SegmentDescriptor(json: text)
    } catch {
      throw MooncakeError(
        error.code,
        "metadata \(store.uri): key '\(key)': \(error.message): its owner should publish it again; "
          + "else remove it with `mooncake metadata delete`")
    }
    if descriptor.tcpDataPort != 0 && descriptor.tcpDataHost.isEmpty {
      // Mooncake up to 0.3.12 gives the host only in the route.
      descriptor.tcpDataHost = try route(to: descriptor.name, call).host
    }
    return descriptor
  }

  /// Where a process answers RPCs.
  package func route(to name: String, _ call: Call) throws(MooncakeError) -> HostPort {
    try Self.check(name)
    let key = routeKey(name)
    guard let text = try store.get(key, call) else { throw missing(key, "the route to \(name)") }
    let route: HostPort?
    do throws(JSONError) {
      route = try JSONDocument(parsing: text).read { value in
        guard let host = value["ip_or_host_name"]?.string, !host.isEmpty,
          let port = value["rpc_port"]?.unsigned.flatMap({ UInt16(exactly: $0) }), port != 0
        else { return nil }
        return HostPort(host: host, port: port)
      }
    } catch {
      throw malformed(key, error.description)
    }
    guard let route else { throw malformed(key, "ip_or_host_name or rpc_port is missing") }
    return route
  }

  /// The text under the route key. The incarnation is our addition; Mooncake ignores it.
  package static func routeText(
    _ address: HostPort, incarnation: UInt64, metadataVersion: UInt64
  ) -> String {
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("ip_or_host_name", address.host)
    writer.member("rpc_port", UInt64(address.port ?? 0))
    writer.member("metadata_version", metadataVersion)
    writer.member("mooncake_incarnation", SegmentDescriptor.text(incarnation: incarnation))
    writer.endObject()
    return writer.text
  }

  /// The version in a descriptor or route; 0 if it has none.
  package static func metadataVersion(in text: String) -> UInt64 {
    guard let document = try? JSONDocument(parsing: text) else { return 0 }
    return document.read { $0["metadata_version"]?.unsigned ?? 0 }
  }

  private func missing(_ key: String, _ what: String) -> MooncakeError {
    MooncakeError(
      .notFound,
      "metadata \(store.uri): \(what) is not there (key '\(key)'): does its process run, with this "
        + "service and the same MC_METADATA_CLUSTER_ID?")
  }

  private func malformed(_ key: String, _ cause: String) -> MooncakeError {
    MooncakeError(
      .protocolViolation,
      "metadata \(store.uri): key '\(key)': malformed route: \(cause): its owner should publish it "
        + "again; else remove it with `mooncake metadata delete`")
  }
}
