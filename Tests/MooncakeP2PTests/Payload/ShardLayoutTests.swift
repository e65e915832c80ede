import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import Testing

@Suite struct ShardLayoutTests {
  @Test func shardsFollowTheBuffers() throws {
    let layout = try ShardLayout(bufferSizes: [10, 4, 9], shardBytes: 4)
    #expect(layout.size == 23)
    let pieces = (0..<layout.shardCount).map { layout.piece(ofShard: $0) }
    #expect(pieces.map(\.buffer) == [0, 0, 0, 1, 2, 2, 2])
    #expect(pieces.map(\.offset) == [0, 4, 8, 0, 0, 4, 8])
    #expect(pieces.map(\.length) == [4, 4, 2, 4, 4, 4, 1])
    let offsets = (0..<layout.shardCount).map { layout.payloadOffset(ofShard: $0) }
    #expect(offsets == [0, 4, 8, 10, 14, 18, 22])
    for offset in 0..<UInt64(23) {
      let shard = offsets.lastIndex { $0 <= offset }
      #expect(layout.shard(at: offset) == shard)
    }
  }

  @Test func aRangeIsCutAtShards() throws {
    let layout = try ShardLayout(bufferSizes: [10, 4, 9], shardBytes: 4)
    #expect(
      layout.pieces(offset: 6, length: 6) == [
        .init(shard: 1, buffer: 0, offset: 6, length: 2),
        .init(shard: 2, buffer: 0, offset: 8, length: 2),
        .init(shard: 3, buffer: 1, offset: 0, length: 2),
      ])
    #expect(layout.pieces(offset: 0, length: 23)?.count == 7)
    #expect(layout.pieces(offset: 23, length: 0) == [])
    #expect(layout.pieces(offset: 22, length: 2) == nil)
    #expect(layout.pieces(offset: .max, length: 2) == nil)
  }

  @Test func sizesAreChecked() throws {
    let bad: [([UInt64], UInt64)] = [
      ([1], 0), ([1], (1 << 32) + 1), ([0], 1), ([5, 0, 5], 1), ([.max], 1 << 32),
      ([.max, .max], 1 << 32), ([1 << 63, 1], 1 << 32), ([(1 << 20) + 1], 1),
      ([1 << 19, 1 << 19, 1], 1), (Array(repeating: 1, count: 65_537), 1),
    ]
    for (sizes, shardBytes) in bad {
      let error = #expect(throws: MooncakeError.self) {
        try ShardLayout(bufferSizes: sizes, shardBytes: shardBytes)
      }
      #expect(error?.code == .invalidArgument)
    }
    #expect(try ShardLayout(bufferSizes: [1 << 20], shardBytes: 1).shardCount == 1 << 20)
    #expect(try ShardLayout(bufferSizes: [], shardBytes: 1).shardCount == 0)
  }

  @Test func defaultSizes() throws {
    for (size, expected) in [
      (1, 1 << 20), (256 << 20, 1 << 20), (512 << 20, 2 << 20), (1000 << 20, 2 << 20),
      (100 << 30, 64 << 20), (200 << 40, 256 << 20),
    ] as [(UInt64, UInt64)] {
      #expect(ShardLayout.defaultShardBytes(bufferSizes: [size]) == expected)
    }
    let many = Array(repeating: UInt64(1 << 30), count: 65_536)
    let bytes = ShardLayout.defaultShardBytes(bufferSizes: many)
    #expect(try ShardLayout(bufferSizes: many, shardBytes: bytes).shardCount <= 1 << 20)
    #expect(ShardLayout.defaultShardBytes(bufferSizes: [.max, .max]) == 1 << 32)
    #expect(ShardLayout.defaultShardBytes(bufferSizes: []) == 1 << 20)
  }
}
