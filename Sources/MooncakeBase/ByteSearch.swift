extension Collection<UInt8> {
  /// Whether the bytes of a text occur. The standard library's search would link its regular
  /// expression module.
  package func holds(_ text: some StringProtocol) -> Bool {
    let mark = text.utf8
    guard let first = mark.first else { return true }
    var rest = self[...]
    while let index = rest.firstIndex(of: first) {
      rest = rest[index...]
      if rest.starts(with: mark) { return true }
      rest = rest.dropFirst()
    }
    return false
  }
}
