import MooncakeP2P
import Testing

@Suite struct ShardSetTests {
  @Test func bytesAndBack() throws {
    var set = ShardSet(count: 77)
    for shard in [0, 7, 8, 63, 64, 76] { set.insert(shard) }
    let copy = try #require(ShardSet(count: 77, bytes: set.bytes))
    #expect(copy == set)
    #expect(copy.memberCount == 6)
  }

  @Test func aBitBeyondTheLastShardIsRefused() {
    #expect(ShardSet(count: 3, bytes: [0b1000]) == nil)
    #expect(ShardSet(count: 3, bytes: [0b111])?.isFull == true)
    #expect(ShardSet(count: 3, bytes: [0, 0]) == nil)
  }

  @Test func whatTheOtherLacks() {
    var other = ShardSet(count: 130)
    other.insert(1)
    other.insert(129)
    var found: [Int] = []
    ShardSet(count: 130, isFull: true).forEach(notIn: other) { shard in
      found.append(shard)
      return true
    }
    #expect(found.count == 128)
    #expect(!found.contains(1) && !found.contains(129))
  }
}
