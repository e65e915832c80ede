/// What a metadata service is sent to let this process in. A service that refuses may quote it, and
/// so may what stands between: it is taken out of what people read.
struct ServiceSecrets: Sendable {
  private let secrets: [[UInt8]]

  /// Each also as JSON quotes it. Longer ones go first: one may be a part of another.
  init(_ texts: String?...) {
    var secrets: Set<[UInt8]> = []
    for case .some(let text) in texts where !text.isEmpty {
      secrets.insert(Array(text.utf8))
      var writer = JSONWriter()
      writer.value(text)
      secrets.insert(Array(writer.text.utf8.dropFirst().dropLast()))
    }
    self.secrets = secrets.sorted { $0.count > $1.count }
  }

  /// The text with marks instead of secrets.
  func hidden(in text: some Collection<UInt8>) -> String {
    var rest = Array(text)[...]
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
