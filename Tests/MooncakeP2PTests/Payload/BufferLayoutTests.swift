import MooncakeP2P
import Testing

@Suite struct BufferLayoutTests {
  private func buffer(_ range: Range<UInt64>) -> BufferLayout.Buffer {
    .init(address: range.lowerBound, length: UInt64(range.count))
  }

  private func overlap(_ first: [Range<UInt64>], _ second: [Range<UInt64>]) -> Bool {
    let (one, two) = (first.map(buffer), second.map(buffer))
    let answer = BufferLayout.overlap(one, two)
    #expect(BufferLayout.overlap(two, one) == answer)
    #expect(BufferLayout.overlap(one.reversed(), two) == answer)
    return answer
  }

  @Test func whatSharesAByteOverlaps() {
    #expect(!overlap([], [1..<2]))
    #expect(!overlap([10..<20, 30..<40], [20..<30, 40..<50, 1..<10]))
    #expect(overlap([10..<20], [19..<21]))
    #expect(overlap([10..<20], [10..<11]))
    #expect(overlap([1..<100], [50..<51]))
    // A long one that begins long before.
    #expect(overlap([1..<100, 10..<20, 30..<40], [2..<3]))
    #expect(overlap([1..<100, 10..<20], [200..<300, 90..<91]))
    // Overlaps within one list do not count.
    #expect(!overlap([10..<20, 15..<25], [25..<30, 26..<28]))
    #expect(overlap([1..<2], [0xFFFF_0000..<0xFFFF_0001, 1..<3]))
  }

  /// Unsorted, as an allocator hands them out.
  @Test func manyBuffersAreComparedSeldom() {
    let count = 16_384
    var generator = SystemRandomNumberGenerator()
    var (first, second): ([BufferLayout.Buffer], [BufferLayout.Buffer]) = ([], [])
    for index in 0..<UInt64(count) {
      first.append(.init(address: index * 200 + 1, length: 100))
      second.append(.init(address: index * 200 + 101, length: 100))
    }
    first.shuffle(using: &generator)
    second.shuffle(using: &generator)
    var comparisons = 0
    #expect(!BufferLayout.overlap(first, second, comparisons: &comparisons))
    // Sorting 32,768 takes 15 comparisons each; all pairs would be 268 million.
    #expect(comparisons < 40 * count, "\(comparisons)")
  }
}
