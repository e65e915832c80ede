import MooncakeBase

/// Finds the first complete line that holds one of some marks, in a text that grows. Each byte is
/// looked at once or twice, however small the pieces are that it comes in.
package struct LineMark: Sendable {
  package let marks: [String]
  /// Up to where there is no line end.
  private var searchedCount = 0
  private var lineStart = 0

  package init(_ marks: String...) { self.marks = marks }

  /// Whether it is there by now; `text` is what it was at the last call and more behind it.
  package mutating func isFound(in text: [UInt8]) -> Bool {
    while let end = text[searchedCount...].firstIndex(of: UInt8(ascii: "\n")) {
      let line = text[lineStart..<end]
      lineStart = end + 1
      searchedCount = lineStart
      if marks.contains(where: { line.holds($0) }) { return true }
    }
    searchedCount = text.count
    return false
  }
}
