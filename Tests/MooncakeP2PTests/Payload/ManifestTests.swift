import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import Testing

@Suite struct ManifestTests {
  private static func manifest(attributes: [UInt8] = Array("list".utf8)) throws -> Manifest {
    let layout = try ShardLayout(bufferSizes: [10, 4], shardBytes: 4)
    let digests = (0..<UInt64(4)).map { Digest(high: $0 << 60, low: $0) }
    return try Manifest(layout: layout, digests: digests, attributes: attributes)
  }

  private func violation(_ bytes: [UInt8]) -> String? {
    let error = #expect(throws: MooncakeError.self) { try Manifest(parsing: bytes) }
    #expect(error?.code == .protocolViolation)
    return error?.message
  }

  @Test func bytesAndBack() throws {
    let manifest = try Self.manifest()
    #expect(manifest.bytes.count == 48 + 2 * 8 + 4 * 16 + 4)
    #expect(manifest.bytes.starts(with: "MSHRMFT1".utf8))
    #expect(
      manifest.bytes[8..<24].elementsEqual([14, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]))
    let copy = try Manifest(parsing: manifest.bytes)
    #expect(copy == manifest)
    #expect(copy.version == manifest.version)
    #expect(copy.attributes == Array("list".utf8))
  }

  @Test func theVersionTellsContentsApart() throws {
    #expect(try Self.manifest().version == Self.manifest().version)
    #expect(try Self.manifest().version != Self.manifest(attributes: []).version)
  }

  @Test func aWritablePayloadHasNoDigests() throws {
    let layout = try ShardLayout(bufferSizes: [100], shardBytes: 10)
    let manifest = try Manifest(layout: layout, digests: [], isWritable: true, salt: 7)
    let copy = try Manifest(parsing: manifest.bytes)
    #expect(copy.isWritable && copy.digests.isEmpty && copy.layout.shardCount == 10)
    #expect(
      try manifest.version
        != Manifest(layout: layout, digests: [], isWritable: true, salt: 8).version)
  }

  @Test func nothingAtAllIsAPayload() throws {
    let layout = try ShardLayout(bufferSizes: [], shardBytes: 1 << 20)
    let manifest = try Manifest(layout: layout, digests: [], attributes: [1])
    #expect(try Manifest(parsing: manifest.bytes) == manifest)
  }

  @Test func everyTruncationIsRefused() throws {
    let bytes = try Self.manifest().bytes
    for count in 0..<bytes.count { _ = violation(Array(bytes[..<count])) }
    _ = violation(bytes + [0])
  }

  @Test func hostileNumbersAreRefused() throws {
    func changed(_ offset: Int, _ values: [UInt8]) throws -> [UInt8] {
      var bytes = try Self.manifest().bytes
      bytes.replaceSubrange(offset..<offset + values.count, with: values)
      return bytes
    }
    let ones = [UInt8](repeating: 0xFF, count: 8)
    #expect(violation(try changed(0, [0]))?.contains("begin") == true)
    #expect(violation(try changed(8, [15]))?.contains("15") == true)
    #expect(violation(try changed(8, ones)) != nil)
    #expect(violation(try changed(16, [0]))?.contains("shards of 0 bytes") == true)
    #expect(violation(try changed(16, ones)) != nil)
    #expect(violation(try changed(32, [2]))?.contains("flags") == true)
    for offset in [36, 40, 44] {
      #expect(violation(try changed(offset, [0xFF, 0xFF, 0xFF, 0xFF]))?.contains("counts") == true)
    }
    #expect(violation(try changed(48, ones)) != nil)
    #expect(violation(try changed(48, Array(repeating: 0, count: 8)))?.contains("buffer 0") == true)
    // One shard less and an attribute more: the sum fits, the layout does not.
    #expect(violation(try changed(40, [3, 0, 0, 0, 20]))?.contains("4 shards") == true)
  }

  @Test func randomChangesNeverPassUnnoticed() throws {
    let manifest = try Self.manifest()
    var generator = SystemRandomNumberGenerator()
    for _ in 0..<5000 {
      var bytes = manifest.bytes
      let offset = Int.random(in: 0..<bytes.count, using: &generator)
      bytes[offset] ^= UInt8.random(in: 1...255, using: &generator)
      guard let parsed = try? Manifest(parsing: bytes) else { continue }
      #expect(parsed.version != manifest.version && parsed.bytes == bytes)
    }
  }

  @Test func tooManyAttributesAreRefused() throws {
    let layout = try ShardLayout(bufferSizes: [], shardBytes: 1)
    let attributes = [UInt8](repeating: 0, count: Manifest.maximumAttributeBytes + 1)
    #expect(throws: MooncakeError.self) {
      try Manifest(layout: layout, digests: [], attributes: attributes)
    }
  }
}
