import MooncakeMetadata
import Testing

struct LineMarkTests {
  private let text = Array("{\"created\":1}\n{\"progress\":1}\n{\"events\":[]}\nrest".utf8)

  @Test func findsTheLineInPiecesOfAnySize() {
    let end = text.count - 4
    for size in 1...text.count {
      var mark = LineMark("\"events\"", "\"error\"")
      var count = 0
      while count < text.count {
        count = min(text.count, count + size)
        if mark.isFound(in: Array(text[..<count])) { break }
      }
      #expect(count >= end && count < end + size)
    }
  }

  /// 8 MiB in pieces of 2 KiB. Searching from the start each time would look at 16 GiB, which takes
  /// minutes; looking at each byte once takes seconds even under the thread sanitizer.
  @Test(.timeLimit(.minutes(1))) func longLinesAreLookedAtOnce() {
    var mark = LineMark("\"events\"")
    var text = Array("{\"events\":\"".utf8)
    text.reserveCapacity(9 << 20)
    let piece = [UInt8](repeating: 0x61, count: 2 << 10)
    for _ in 0..<4096 {
      text.append(contentsOf: piece)
      if mark.isFound(in: text) { Issue.record("found without a line end") }
    }
    text.append(0x0A)
    let isFound = mark.isFound(in: text)
    #expect(isFound)
  }
}
