import MooncakeBase
import MooncakeEngine

/// Where the shards of a payload are. Buffers are cut one after the other; no shard spans two, and
/// the last one of each may be shorter.
package struct ShardLayout: Equatable, Sendable {
  package static let maximumShardCount = 1 << 20
  package static let maximumBufferCount = 65_536
  package static let maximumShardBytes: UInt64 = 1 << 32

  /// A shard, or part of one, within its buffer.
  package struct Piece: Equatable, Sendable {
    package var shard: Int
    package var buffer: Int
    /// From the start of the buffer.
    package var offset: UInt64
    package var length: UInt64

    package init(shard: Int, buffer: Int, offset: UInt64, length: UInt64) {
      self.shard = shard
      self.buffer = buffer
      self.offset = offset
      self.length = length
    }
  }

  package let bufferSizes: [UInt64]
  package let shardBytes: UInt64
  /// Where each buffer begins in the payload, then where the payload ends.
  private let bufferOffsets: [UInt64]
  /// The first shard of each buffer, then the number of shards.
  private let firstShards: [Int]

  /// Bytes of all buffers.
  package var size: UInt64 { bufferOffsets[bufferSizes.count] }
  package var shardCount: Int { firstShards[bufferSizes.count] }

  /// Checks the sizes. They may come from a caller or a peer, so the error has the given code.
  package init(
    bufferSizes: [UInt64], shardBytes: UInt64, failure code: MooncakeError.Code = .invalidArgument
  ) throws(MooncakeError) {
    guard bufferSizes.count <= Self.maximumBufferCount else {
      throw MooncakeError(
        code, "\(bufferSizes.count) buffers; a payload has at most \(Self.maximumBufferCount)")
    }
    guard shardBytes > 0 && shardBytes <= Self.maximumShardBytes else {
      throw MooncakeError(
        code, "shards of \(shardBytes) bytes; a shard has 1 to \(Self.maximumShardBytes)")
    }
    var offsets: [UInt64] = [0]
    var shards = [0]
    offsets.reserveCapacity(bufferSizes.count + 1)
    shards.reserveCapacity(bufferSizes.count + 1)
    for (index, length) in bufferSizes.enumerated() {
      if length == 0 { throw MooncakeError(code, "buffer \(index) of the payload has no bytes") }
      let (end, overflow) = offsets[index].addingReportingOverflow(length)
      if overflow || end > UInt64(Int64.max) {
        throw MooncakeError(code, "the buffers have more than 2^63 - 1 bytes together")
      }
      let count = (length - 1) / shardBytes + 1
      guard count <= UInt64(Self.maximumShardCount - shards[index]) else {
        throw MooncakeError(
          code,
          "more than \(Self.maximumShardCount) shards of \(shardBytes) bytes: choose larger shards")
      }
      offsets.append(end)
      shards.append(shards[index] + Int(count))
    }
    self.bufferSizes = bufferSizes
    self.shardBytes = shardBytes
    bufferOffsets = offsets
    firstShards = shards
  }

  /// Shard size if the caller asks for none: some hundred shards per payload, neither tiny nor slow
  /// to arrive.
  package static func defaultShardBytes(bufferSizes: [UInt64]) -> UInt64 {
    var size: UInt64 = 0
    for length in bufferSizes {
      size = size.addingReportingOverflow(length).overflow ? .max : size + length
    }
    let wanted = min(max(size / 256, 1 << 20), 64 << 20)
    var bytes = UInt64(1) << UInt64(63 - wanted.leadingZeroBitCount)
    // Each buffer may end with a short shard.
    let room = UInt64(max(1, maximumShardCount - bufferSizes.count))
    while bytes < maximumShardBytes && size / bytes >= room { bytes *= 2 }
    return bytes
  }

  /// A whole shard.
  package func piece(ofShard shard: Int) -> Piece {
    let buffer = index(of: shard, in: firstShards)
    let offset = UInt64(shard - firstShards[buffer]) * shardBytes
    return Piece(
      shard: shard, buffer: buffer, offset: offset,
      length: min(shardBytes, bufferSizes[buffer] - offset))
  }

  /// Where a shard begins in the payload.
  package func payloadOffset(ofShard shard: Int) -> UInt64 {
    let piece = piece(ofShard: shard)
    return bufferOffsets[piece.buffer] + piece.offset
  }

  /// The bytes of the payload that make up a shard.
  package func range(ofShard shard: Int) -> (offset: UInt64, length: UInt64) {
    let piece = piece(ofShard: shard)
    return (bufferOffsets[piece.buffer] + piece.offset, piece.length)
  }

  /// The shards that a range of the payload touches; it must not be empty or reach beyond the end.
  package func shards(in range: Range<UInt64>) -> Range<Int> {
    shard(at: range.lowerBound)..<(shard(at: range.upperBound - 1) + 1)
  }

  /// Where a buffer begins in the payload.
  package func payloadOffset(ofBuffer buffer: Int) -> UInt64 { bufferOffsets[buffer] }

  /// The shard that contains an offset of the payload, which must be less than the size.
  package func shard(at offset: UInt64) -> Int {
    let buffer = index(of: offset, in: bufferOffsets)
    return firstShards[buffer] + Int((offset - bufferOffsets[buffer]) / shardBytes)
  }

  /// The pieces of a range of the payload, in order; nil if it reaches beyond the end.
  package func pieces(offset: UInt64, length: UInt64) -> [Piece]? {
    let (end, overflow) = offset.addingReportingOverflow(length)
    if overflow || end > size { return nil }
    var pieces: [Piece] = []
    var position = offset
    while position < end {
      var piece = piece(ofShard: shard(at: position))
      let skipped = position - bufferOffsets[piece.buffer] - piece.offset
      piece.offset += skipped
      piece.length = min(piece.length - skipped, end - position)
      pieces.append(piece)
      position += piece.length
    }
    return pieces
  }

  /// The last index whose start is not greater than the value.
  private func index<Number: Comparable>(of value: Number, in starts: [Number]) -> Int {
    var low = 0
    var high = bufferSizes.count
    while high - low > 1 {
      let middle = (low + high) / 2
      if starts[middle] <= value { low = middle } else { high = middle }
    }
    return low
  }
}
