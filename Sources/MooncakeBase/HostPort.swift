import CLinux
import Glibc

/// Why a text is not a host and port.
public struct HostPortError: Error, Equatable, Sendable, CustomStringConvertible {
  /// A clause to put after the text, such as "the port is not a number from 0 to 65535".
  public let reason: String

  public var description: String { reason }
}

/// A host name or numeric address with an optional port.
///
/// Accepted: `host`, `host:port`, `[v6]`, `[v6]:port`, a bare IPv6 address with or without
/// `%scope`, and `v6%scope:port`. Anything else is split at the last colon.
public struct HostPort: Equatable, Hashable, Sendable, CustomStringConvertible {
  /// Without brackets; may carry `%scope`.
  public var host: String
  public var port: UInt16?

  /// Longest text accepted, in bytes: far beyond the 253 of a host name.
  public static let maximumBytes = 1024

  public init(host: String, port: UInt16? = nil) {
    self.host = host
    self.port = port
  }

  /// Parses a text; a malformed port is an error.
  public init(parsing text: String) throws(HostPortError) {
    let parts = try Self.split(text)
    host = parts.host
    guard let digits = parts.port else { return }
    guard let port = Self.parsePort(digits) else {
      throw HostPortError(reason: "the port is not a number from 0 to 65535")
    }
    self.port = port
  }

  /// Parses a text as Mooncake does: a missing or malformed port becomes `defaultPort`.
  public init(parsing text: String, defaultPort: UInt16) throws(HostPortError) {
    let parts = try Self.split(text)
    host = parts.host
    port = parts.port.flatMap { Self.parsePort($0) } ?? defaultPort
  }

  /// "host:port", IPv6 hosts in brackets; without a port the host alone.
  public var description: String {
    let name = host.utf8.contains(UInt8(ascii: ":")) ? "[\(host)]" : host
    guard let port else { return name }
    return "\(name):\(port)"
  }

  private static func split(
    _ text: String
  ) throws(HostPortError) -> (host: String, port: Substring?) {
    if text.isEmpty { throw HostPortError(reason: "it is empty") }
    if text.utf8.count > maximumBytes {
      throw HostPortError(reason: "it is longer than \(maximumBytes) bytes")
    }
    if text.utf8.contains(where: { $0 <= 0x20 || $0 == 0x7F }) {
      throw HostPortError(reason: "it contains a space or control character")
    }
    if text.utf8.first == UInt8(ascii: "[") { return try splitBracketed(text) }
    if text.utf8.contains(where: { $0 == UInt8(ascii: "[") || $0 == UInt8(ascii: "]") }) {
      throw HostPortError(reason: "brackets belong around the whole host")
    }
    if isIPv6(text) { return (text, nil) }
    if let percent = text.firstIndex(of: "%"), isIPv6(String(text[..<percent])) {
      return try splitScoped(text, percent: percent)
    }
    guard let colon = text.lastIndex(of: ":") else { return (try checkedHost(text), nil) }
    return (try checkedHost(String(text[..<colon])), text[text.index(after: colon)...])
  }

  private static func splitBracketed(
    _ text: String
  ) throws(HostPortError) -> (host: String, port: Substring?) {
    guard let close = text.firstIndex(of: "]") else {
      throw HostPortError(reason: "the bracket is not closed")
    }
    let host = String(text[text.index(after: text.startIndex)..<close])
    let address = host.prefix { $0 != "%" }
    let scope = host.dropFirst(address.count)
    guard isIPv6(String(address)), scope != "%", !scope.contains("[") else {
      throw HostPortError(reason: "the brackets hold no IPv6 address")
    }
    let rest = text[text.index(after: close)...]
    if rest.isEmpty { return (host, nil) }
    if rest.first != ":" { throw HostPortError(reason: "the bracket is not followed by a port") }
    return (host, rest.dropFirst())
  }

  private static func splitScoped(
    _ text: String, percent: String.Index
  ) throws(HostPortError) -> (host: String, port: Substring?) {
    let scope = text[text.index(after: percent)...]
    let colon = scope.lastIndex(of: ":")
    if scope[..<(colon ?? scope.endIndex)].isEmpty {
      throw HostPortError(reason: "the scope after % is empty")
    }
    guard let colon else { return (text, nil) }
    return (String(text[..<colon]), text[text.index(after: colon)...])
  }

  private static func checkedHost(_ host: String) throws(HostPortError) -> String {
    if host.isEmpty { throw HostPortError(reason: "the host is empty") }
    // Eight groups followed by a port are unambiguous; other colons are not.
    if host.utf8.contains(UInt8(ascii: ":")) && !isIPv6(host) {
      throw HostPortError(reason: "the host is neither a name nor an IPv6 address in brackets")
    }
    return host
  }

  private static func parsePort(_ digits: Substring) -> UInt16? {
    guard (1...5).contains(digits.utf8.count),
      digits.utf8.allSatisfy({ (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) })
    else { return nil }
    return UInt16(digits)
  }

  private static func isIPv6(_ text: String) -> Bool {
    var address = in6_addr()
    return inet_pton(AF_INET6, text, &address) == 1
  }
}
