import MooncakeBase

/// The secret that an HTTP metadata server requires of every client, in the form that Mooncake
/// uses: `Authorization: Bearer TOKEN`. It never appears in messages or logs.
package struct MetadataToken: Sendable {
  /// The environment variable from which both sides read it.
  package static let variable = "MC_METADATA_HTTP_TOKEN"

  private let bytes: [UInt8]
  private static let scheme = "bearer"
  private static let maximumBytes = 4096

  /// `source` tells errors where the text came from.
  package init(_ text: String, from source: String) throws(MooncakeError) {
    bytes = Array(text.utf8)
    // A header's value must arrive unchanged at the other end.
    let isPlain = bytes.allSatisfy { $0 >= 0x20 && $0 < 0x7F }
    if !isPlain || bytes.first == 0x20 || bytes.last == 0x20 {
      throw MooncakeError(
        .invalidArgument,
        "\(source) has a character that is not printable ASCII, or a space at its start "
          + "or end: correct it here and at the other side")
    }
    if bytes.isEmpty || bytes.count > Self.maximumBytes {
      throw MooncakeError(
        .invalidArgument, "\(source) is empty or longer than \(Self.maximumBytes) bytes")
    }
  }

  /// The HTTP header that carries it.
  var header: String { "Authorization: Bearer \(String(decoding: bytes, as: UTF8.self))" }

  /// Whether an Authorization header's value contains the token. Runs in constant time, so that
  /// timing reveals nothing about the token.
  package func isPresented(by value: some Collection<UInt8>) -> Bool {
    let end = value.firstIndex(of: 0x20) ?? value.endIndex
    guard value[..<end].lowercased(equals: Self.scheme) else { return false }
    let given = Array(value[end...].drop { $0 == 0x20 })
    var difference = given.count ^ bytes.count
    for index in bytes.indices {
      difference |= Int(bytes[index] ^ (index < given.count ? given[index] : 0))
    }
    return difference == 0
  }
}

extension Collection<UInt8> {
  fileprivate func lowercased(equals text: String) -> Bool {
    elementsEqual(text.utf8) { ($0 >= 0x41 && $0 <= 0x5A ? $0 | 0x20 : $0) == $1 }
  }
}
