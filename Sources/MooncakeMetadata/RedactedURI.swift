/// A URI's text for messages: shortened, on one line, and without anything that is a secret, or may
/// be one in a malformed text.
package enum RedactedURI {
  private static let mark = "***"
  private static let shownBytes = 200
  private static let longestName = 16
  /// Query parameters that are shown: they hold file names.
  private static let plainNames = ["ca", "cert", "key"]

  package static func text(_ text: String) -> String {
    // The scheme cannot contain a password, but the text before a later "://" may.
    let parts = MetadataURI.split(text, at: "://")
    let isScheme = parts.map { $0.head.utf8.allSatisfy { $0 >= 0x41 && $0 <= 0x7A } } ?? false
    let body = isScheme ? parts!.tail : text[...]
    var shown = String(text[..<body.startIndex])
    // Searches bytes: a combining mark after '@' must not hide it.
    if let at = body.utf8.lastIndex(of: UInt8(ascii: "@")) {
      // A password with an unencoded slash or question mark extends beyond the authority; hide it,
      // too.
      if let colon = body[..<at].utf8.firstIndex(of: UInt8(ascii: ":")) {
        shown += "\(body[..<colon]):\(mark)\(hidingQuery(body[at...]))"
      } else if isName(body[..<at], shown) {
        shown += hidingQuery(body)
      } else {
        shown += "\(mark)\(hidingQuery(body[at...]))"
      }
    } else {
      shown += hidingQuery(hidingPasswords(body)[...])
    }
    if shown.utf8.count > shownBytes { shown = String(shown.prefix(shownBytes)) + "..." }
    let isPlain = shown.utf8.allSatisfy { $0 > 0x20 && $0 != 0x7F }
    return isPlain && !shown.isEmpty ? shown : String(reflecting: shown)
  }

  /// Whether text without a colon before '@' is a user name and not a token or password. For Redis
  /// it may be a password.
  private static func isName(_ text: Substring, _ scheme: String) -> Bool {
    if scheme.lowercased() == "redis://" { return text.isEmpty }
    return text.utf8.count <= longestName
      && text.utf8.allSatisfy {
        (0x61...0x7A).contains($0) || (0x30...0x39).contains($0) || "-_.".utf8.contains($0)
      }
  }

  /// Text in place of a port may be a password whose host is missing.
  private static func hidingPasswords(_ body: Substring) -> String {
    var shown = ""
    var start = body.startIndex
    while start < body.endIndex {
      let end = body.utf8[start...].firstIndex { ",;".utf8.contains($0) } ?? body.endIndex
      shown += hidingPassword(body[start..<end])
      if end == body.endIndex { break }
      start = body.utf8.index(after: end)
      shown += body[end..<start]
    }
    return shown
  }

  private static func hidingPassword(_ endpoint: Substring) -> String {
    let rest = MetadataURI.split(endpoint, at: "://")?.tail ?? endpoint
    let authority = rest[..<(rest.utf8.firstIndex { "/?#".utf8.contains($0) } ?? rest.endIndex)]
    // Several colons belong to an IPv6 address.
    let mark = UInt8(ascii: ":")
    guard let colon = authority.utf8.firstIndex(of: mark),
      colon == authority.utf8.lastIndex(of: mark)
    else { return String(endpoint) }
    let port = authority[authority.utf8.index(after: colon)...]
    let isPort =
      colon > authority.startIndex && (1...5).contains(port.utf8.count)
      && port.utf8.allSatisfy { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) }
    if isPort { return String(endpoint) }
    return "\(endpoint[..<colon]):\(Self.mark)\(endpoint[authority.endIndex...])"
  }

  private static func hidingQuery(_ text: Substring) -> String {
    guard let start = text.utf8.firstIndex(of: UInt8(ascii: "?")) else { return String(text) }
    let query = text[text.utf8.index(after: start)...]
    let parts = query.utf8.split(
      separator: UInt8(ascii: "&"), omittingEmptySubsequences: false
    ).map { bytes in
      let part = Substring(bytes)
      guard let equals = bytes.firstIndex(of: UInt8(ascii: "=")) else {
        return part.isEmpty ? "" : mark
      }
      let name = part[..<equals]
      return plainNames.contains { $0 == name } ? String(part) : "\(name)=\(mark)"
    }
    return "\(text[..<start])?\(parts.joined(separator: "&"))"
  }
}
