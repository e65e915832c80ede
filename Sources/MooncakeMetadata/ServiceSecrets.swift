import MooncakeBase

/// What a metadata service is sent to let this process in. A service that refuses may quote it, and
/// so may what stands between: it is taken out of what people read.
///
/// What an answer means is found out from the answer itself: a mark might stand in a word of it.
package struct ServiceSecrets: Sendable {
  private let secrets: [[UInt8]]
  /// One that is shorter may be a part of any word, and marks would tell where.
  private static let shortestMarked = 6

  /// Each also as JSON quotes it. Longer ones go first: one may be a part of another.
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

  /// The text with marks instead of secrets; a mark alone if it holds a short one.
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
