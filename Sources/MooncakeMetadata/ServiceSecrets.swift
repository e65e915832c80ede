import MooncakeBase

/// The secrets that this process sends to a metadata service. A service that refuses may quote
/// them, and so may proxies; they are removed from all messages.
///
/// Interpret the original answer, not the hidden text: a mark may replace part of a word in it.
package struct ServiceSecrets: Sendable {
  private let secrets: [[UInt8]]
  /// Shorter secrets may occur in any word, and marks would reveal where.
  private static let shortestMarked = 6

  /// Includes each secret in JSON's quoting. Longer ones come first, since one may be part of
  /// another.
  package init(_ texts: String?...) {
    var secrets: Set<[UInt8]> = []
    for case .some(let text) in texts where !text.isEmpty {
      secrets.insert(Array(text.utf8))
      var writer = JSONWriter()
      writer.value(text)
      secrets.insert(Array(writer.text.utf8.dropFirst().dropLast()))
    }
    self.secrets = secrets.sorted { $0.count > $1.count }
  }

  /// The text with marks in place of secrets; only a mark if it contains a short one.
  package func hidden(in text: some Collection<UInt8>) -> String {
    var rest = Array(text)[...]
    let isTold = secrets.contains { secret in
      secret.count < Self.shortestMarked
        && rest.indices.contains { rest[$0...].starts(with: secret) }
    }
    if isTold { return "***" }
    var shown: [UInt8] = []
    while let first = rest.first {
      if let secret = secrets.first(where: { rest.starts(with: $0) }) {
        shown += "***".utf8
        rest = rest.dropFirst(secret.count)
      } else {
        shown.append(first)
        rest = rest.dropFirst()
      }
    }
    return String(decoding: shown, as: UTF8.self)
  }
}
