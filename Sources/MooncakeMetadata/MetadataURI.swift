import MooncakeBase
import MooncakeSystem

/// Where metadata is kept: `P2PHANDSHAKE` or the URI of a service.
///
///     etcd://[user:password@]host:port[,host:port...][?ca=FILE&cert=FILE&key=FILE]
///     redis://[user:password@]host[:port][/database]
///     http[s]://[user:password@]host[:port][/path][?ca=FILE&cert=FILE&key=FILE]
///
/// Without a scheme it is etcd. Endpoints may also be separated by semicolons.
package struct MetadataURI: Sendable, CustomStringConvertible {
  package enum Service: Sendable { case peerToPeer, http, etcd, redis }

  package let service: Service
  /// At least one, each with a port; none for `P2PHANDSHAKE`.
  package private(set) var endpoints: [HostPort] = []
  package private(set) var user: String?
  package private(set) var password: String?
  /// With its leading slash; HTTP only.
  package private(set) var path = ""
  /// Redis only.
  package private(set) var database: UInt8?
  package private(set) var isSecure = false
  package private(set) var tls = TLSFiles()
  /// As given, with possible secrets hidden.
  package let description: String

  private static let maximumBytes = 4096
  private static let maximumEndpointCount = 64

  /// Parses a text. Errors quote it with possible secrets hidden.
  package init(parsing text: String) throws(MooncakeError) {
    do throws(Malformed) {
      self = try Self.parse(text)
    } catch {
      // If the text contains a secret, the part in error may be part of it, so do not quote it.
      let shown = RedactedURI.text(text)
      let hasSecret = text.contains("@") || shown.contains("***")
      let part = error.part.map { hasSecret ? "a part of it " : "'\($0.prefix(100))' " } ?? ""
      let hint =
        text.contains("@") ? " (percent-encode all but letters and digits of a password)" : ""
      throw MooncakeError(.invalidArgument, "metadata \(shown): \(part)\(error.reason)\(hint)")
    }
  }

  private struct Malformed: Error {
    let reason: String
    /// The part of the text that the reason is about.
    var part: Substring?
  }

  private init(_ service: Service, _ description: String) {
    self.service = service
    self.description = description
  }

  private static func parse(_ text: String) throws(Malformed) -> MetadataURI {
    if text == "P2PHANDSHAKE" { return MetadataURI(.peerToPeer, text) }
    if text.isEmpty { throw Malformed(reason: "it is empty: name a service or P2PHANDSHAKE") }
    if text.utf8.count > maximumBytes {
      throw Malformed(reason: "it is longer than \(maximumBytes) bytes")
    }
    if text.utf8.contains(where: { $0 <= 0x20 || $0 == 0x7F }) {
      throw Malformed(reason: "it contains a space or control character: percent-encode it")
    }
    let parts = split(text, at: "://")
    let scheme = parts.map { String($0.head).lowercased() } ?? "etcd"
    guard
      let service: Service =
        ["http": .http, "https": .http, "etcd": .etcd, "redis": .redis][scheme]
    else {
      throw Malformed(
        reason: "is an unknown scheme: use etcd, redis, http, https or P2PHANDSHAKE",
        part: scheme[...])
    }
    var uri = MetadataURI(service, RedactedURI.text(text))
    uri.isSecure = scheme == "https"
    var rest = parts?.tail ?? text[...]
    if rest.contains("#") { throw Malformed(reason: "a '#' has no meaning here") }
    if let (head, query) = split(rest, at: "?") {
      rest = head
      try uri.readQuery(query)
    }
    // etcd has no path, but each of its endpoints may carry a scheme, and so slashes.
    let slash = (service == .etcd ? nil : rest.firstIndex(of: "/")) ?? rest.endIndex
    try uri.readAuthority(rest[..<slash])
    try uri.readPath(rest[slash...])
    return uri
  }

  private mutating func readAuthority(_ text: Substring) throws(Malformed) {
    var hosts = text
    if let at = text.lastIndex(of: "@") {
      hosts = text[text.index(after: at)...]
      let (user, password) =
        Self.split(text[..<at], at: ":").map { ($0.head, Optional($0.tail)) }
        ?? (text[..<at], nil)
      self.user = try user.isEmpty ? nil : Self.decoded(user)
      self.password = try password.map { text throws(Malformed) in try Self.decoded(text) }
    }
    let standard: UInt16 =
      switch service {
      case .etcd: 2379
      case .redis: 6379
      default: isSecure ? 443 : 80
      }
    for part in hosts.split(omittingEmptySubsequences: false, whereSeparator: { ",;".contains($0) })
    {
      var host = part
      if service == .etcd {
        if let (scheme, rest) = Self.split(part, at: "://") {
          host = rest
          isSecure = isSecure || scheme == "https"
        }
        if host.last == "/" { host.removeLast() }
        if host.contains("/") {
          throw Malformed(reason: "has a path, which has no meaning for etcd", part: part)
        }
      }
      do throws(HostPortError) {
        var endpoint = try HostPort(parsing: String(host))
        endpoint.port = endpoint.port ?? standard
        endpoints.append(endpoint)
      } catch {
        throw Malformed(
          reason: "is neither host nor host:port: \(error.reason)", part: part)
      }
    }
    if endpoints.contains(where: { $0.port == 0 }) {
      throw Malformed(reason: "port 0 cannot be reached")
    }
    if endpoints.count > (service == .etcd ? Self.maximumEndpointCount : 1) {
      throw Malformed(
        reason: service == .etcd
          ? "more than \(Self.maximumEndpointCount) endpoints" : "only etcd takes several endpoints"
      )
    }
  }

  private mutating func readPath(_ text: Substring) throws(Malformed) {
    switch service {
    case .http: path = text.isEmpty || text == "/" ? "/metadata" : String(text)
    case .redis:
      if text.isEmpty || text == "/" { return }
      guard let number = UInt8(text.dropFirst()) else {
        throw Malformed(reason: "is not a database number from 0 to 255", part: text)
      }
      database = number
    default: break
    }
  }

  private mutating func readQuery(_ text: Substring) throws(Malformed) {
    if service == .redis { throw Malformed(reason: "a query has no meaning for redis") }
    for part in text.split(separator: "&") {
      guard let (name, value) = Self.split(part, at: "="), !value.isEmpty else {
        throw Malformed(reason: "is not name=value", part: part)
      }
      let file = try Self.decoded(value)
      switch name {
      case "ca": tls.authority = file
      case "cert": tls.certificate = file
      case "key": tls.key = file
      default:
        throw Malformed(reason: "is unknown: use ca, cert or key", part: name)
      }
    }
    if service == .etcd { isSecure = true }
    if !isSecure && tls != TLSFiles() {
      throw Malformed(reason: "certificate files secure nothing over http: use https")
    }
  }

  private static func decoded(_ text: Substring) throws(Malformed) -> String {
    guard let value = PercentEncoding.decode(text), !value.utf8.contains(0) else {
      throw Malformed(reason: "a percent sign does not begin a byte of a UTF-8 text")
    }
    return value
  }

  static func split(
    _ text: some StringProtocol, at separator: String
  ) -> (head: Substring, tail: Substring)? {
    let text = Substring(text)
    let bytes = text.utf8
    let mark = Array(separator.utf8)
    var start = bytes.startIndex
    while let index = bytes[start...].firstIndex(of: mark[0]) {
      if bytes[index...].starts(with: mark) {
        return (text[..<index], text[bytes.index(index, offsetBy: mark.count)...])
      }
      start = bytes.index(after: index)
    }
    return nil
  }
}
