/// A set of shards by index, a bit each.
package struct ShardSet: Equatable, Sendable {
  package let count: Int
  package private(set) var memberCount = 0
  private var words: [UInt64]

  /// An empty set, or one of all shards.
  package init(count: Int, isFull: Bool = false) {
    self.count = count
    words = Array(repeating: isFull ? .max : 0, count: (count + 63) / 64)
    if isFull {
      memberCount = count
      if count % 64 != 0 { words[words.count - 1] = (1 << UInt64(count % 64)) - 1 }
    }
  }

  /// Bits in order, the first shard in the lowest bit of the first byte; nil if the size is wrong
  /// or a bit beyond the last shard is set.
  package init?(count: Int, bytes: [UInt8]) {
    guard bytes.count == (count + 7) / 8 else { return nil }
    if count % 8 != 0, let last = bytes.last, last >> UInt8(count % 8) != 0 { return nil }
    self.count = count
    words = Array(repeating: 0, count: (count + 63) / 64)
    for (index, byte) in bytes.enumerated() {
      words[index / 8] |= UInt64(byte) << UInt64(index % 8 * 8)
    }
    memberCount = words.reduce(0) { $0 + $1.nonzeroBitCount }
  }

  package var bytes: [UInt8] {
    (0..<(count + 7) / 8).map { UInt8(truncatingIfNeeded: words[$0 / 8] >> UInt64($0 % 8 * 8)) }
  }

  package var isFull: Bool { memberCount == count }
  package var isEmpty: Bool { memberCount == 0 }

  package func contains(_ shard: Int) -> Bool { words[shard / 64] >> UInt64(shard % 64) & 1 != 0 }

  package mutating func insert(_ shard: Int) {
    if contains(shard) { return }
    words[shard / 64] |= 1 << UInt64(shard % 64)
    memberCount += 1
  }

  package mutating func remove(_ shard: Int) {
    if !contains(shard) { return }
    words[shard / 64] &= ~(1 << UInt64(shard % 64))
    memberCount -= 1
  }

  /// Calls `body` with each member that the other set lacks, in order, until it returns false.
  package func forEach(notIn other: ShardSet, _ body: (Int) -> Bool) {
    for index in words.indices {
      var word = words[index] & ~other.words[index]
      while word != 0 {
        if !body(index * 64 + word.trailingZeroBitCount) { return }
        word &= word - 1
      }
    }
  }
}
