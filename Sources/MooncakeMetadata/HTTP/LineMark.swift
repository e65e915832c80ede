import MooncakeBase

/// Finds the first complete line that contains one of the marks, in a text that grows. Examines
/// each byte once or twice, however small the pieces that arrive.
package struct LineMark: Sendable {
  package let marks: [String]
  /// Where to search for the next line end.
  private var searchedCount = 0
  private var lineStart = 0

  package init(_ marks: String...) { self.marks = marks }

  /// Whether such a line has arrived; `text` must be the text of the last call, possibly with more
  /// appended.
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
