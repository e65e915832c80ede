import MooncakeBase
import MooncakeEngine

/// What a payload is, fixed when it is registered: its layout, a digest per shard, and attributes
/// of its publisher. Its own digest is the payload's version.
///
/// The bytes, little-endian: magic, size, shard bytes, salt (8 each), flags, numbers of buffers,
/// shards and attribute bytes (4 each); the buffers' sizes (8 each); the shards' digests (low half,
/// high half); the attributes. The format is never extended: a new one changes the last letter of
/// its magic.
package struct Manifest: Equatable, Sendable {
  package static let maximumAttributeBytes = 16 << 20
  /// No manifest is longer.
  package static let maximumBytes = Int(
    mostBytes(
      bufferCount: UInt64(ShardLayout.maximumBufferCount),
      shardCount: UInt64(ShardLayout.maximumShardCount)))

  /// The longest manifest with that many buffers and shards; the counts must be within their
  /// limits.
  package static func mostBytes(bufferCount: UInt64, shardCount: UInt64) -> UInt64 {
    UInt64(headerBytes + maximumAttributeBytes) + 8 * bufferCount + 16 * shardCount
  }

  package let layout: ShardLayout
  /// One per shard; none if the payload is writable.
  package let digests: [Digest]
  /// Peers may write into the payload, so its bytes have no digests.
  package let isWritable: Bool
  /// Distinguishes payloads without digests; 0 for others, which their content identifies.
  package let salt: UInt64
  /// The publisher's attributes, carried along uninterpreted.
  package let attributes: [UInt8]
  /// The encoded manifest.
  package let bytes: [UInt8]
  package let version: PayloadVersion

  private static let headerBytes = 48
  private static let magic = UInt64(littleEndian: 0x3154_464D_5248_534D)  // "MSHRMFT1"
  private static let writableFlag: UInt32 = 1

  /// Makes the manifest of a local payload.
  package init(
    layout: ShardLayout, digests: [Digest], isWritable: Bool = false, salt: UInt64 = 0,
    attributes: [UInt8] = []
  ) throws(MooncakeError) {
    precondition(digests.count == (isWritable ? 0 : layout.shardCount))
    guard attributes.count <= Self.maximumAttributeBytes else {
      throw MooncakeError(
        .invalidArgument,
        "\(attributes.count) bytes of attributes; at most \(Self.maximumAttributeBytes) travel with"
          + " a payload")
    }
    self.layout = layout
    self.digests = digests
    self.isWritable = isWritable
    self.salt = salt
    self.attributes = attributes

    var bytes: [UInt8] = []
    bytes.reserveCapacity(
      Self.headerBytes + 8 * layout.bufferSizes.count + 16 * digests.count + attributes.count)
    bytes.append(little: Self.magic)
    bytes.append(little: layout.size)
    bytes.append(little: layout.shardBytes)
    bytes.append(little: salt)
    bytes.append(little: isWritable ? Self.writableFlag : 0)
    bytes.append(little: UInt32(layout.bufferSizes.count))
    bytes.append(little: UInt32(layout.shardCount))
    bytes.append(little: UInt32(attributes.count))
    for size in layout.bufferSizes { bytes.append(little: size) }
    for digest in digests {
      bytes.append(little: digest.low)
      bytes.append(little: digest.high)
    }
    bytes += attributes
    self.bytes = bytes
    version = Self.version(of: bytes)
  }

  /// Reads a peer's manifest; every fault is a `protocolViolation`.
  package init(parsing bytes: [UInt8]) throws(MooncakeError) {
    var reader = LittleEndianReader(bytes: bytes)
    guard bytes.count >= Self.headerBytes else {
      throw Self.violation("it does not begin like one")
    }
    try Self.check(magic: reader.next())
    let size: UInt64 = reader.next()
    let shardBytes: UInt64 = reader.next()
    salt = reader.next()
    let flags: UInt32 = reader.next()
    let bufferCount = Int(reader.next() as UInt32)
    let shardCount = Int(reader.next() as UInt32)
    let attributeCount = Int(reader.next() as UInt32)
    guard flags & ~Self.writableFlag == 0 else {
      throw Self.violation("it has flags of a later version")
    }
    isWritable = flags & Self.writableFlag != 0
    let digestCount = isWritable ? 0 : shardCount
    // 32 bits each, so this cannot overflow.
    let expected = Self.headerBytes + 8 * bufferCount + 16 * digestCount + attributeCount
    guard bytes.count == expected else {
      throw Self.violation("it has \(bytes.count) bytes, by its counts it should have \(expected)")
    }
    guard attributeCount <= Self.maximumAttributeBytes else {
      throw Self.violation("\(attributeCount) bytes of attributes are too many")
    }
    guard bufferCount <= ShardLayout.maximumBufferCount else {
      throw Self.violation("\(bufferCount) buffers are too many")
    }
    let sizes: [UInt64] = (0..<bufferCount).map { _ in reader.next() }
    do throws(MooncakeError) {
      layout = try ShardLayout(bufferSizes: sizes, shardBytes: shardBytes)
    } catch {
      throw Self.violation(error.message)
    }
    guard layout.size == size else {
      throw Self.violation("its buffers have \(layout.size) bytes, the payload has \(size)")
    }
    guard layout.shardCount == shardCount else {
      throw Self.violation("its buffers have \(layout.shardCount) shards, not \(shardCount)")
    }
    digests = (0..<digestCount).map { _ in
      let low: UInt64 = reader.next()
      return Digest(high: reader.next(), low: low)
    }
    attributes = Array(bytes[(bytes.count - attributeCount)...])
    self.bytes = bytes
    version = Self.version(of: bytes)
  }

  /// The last letter is the version, a digit.
  private static func check(magic: UInt64) throws(MooncakeError) {
    if magic == Self.magic { return }
    let letter = UInt8(magic >> 56)
    guard magic << 8 == Self.magic << 8,
      (UInt8(ascii: "1")...UInt8(ascii: "9")).contains(letter)
    else { throw violation("it does not begin like one") }
    throw MooncakeError(
      .unsupported,
      "the manifest has version \(letter - UInt8(ascii: "0")), this process knows 1: update "
        + "libmooncake here")
  }

  private static func version(of bytes: [UInt8]) -> PayloadVersion {
    PayloadVersion(bytes.withUnsafeBytes { Digest(of: $0) })
  }

  private static func violation(_ what: String) -> MooncakeError {
    MooncakeError(.protocolViolation, "a malformed manifest: \(what)")
  }
}

extension [UInt8] {
  fileprivate mutating func append<Number: FixedWidthInteger>(little number: Number) {
    Swift.withUnsafeBytes(of: number.littleEndian) { append(contentsOf: $0) }
  }
}

/// Reads numbers one after the other; the caller has checked that there are enough bytes.
private struct LittleEndianReader {
  let bytes: [UInt8]
  private var position = 0

  init(bytes: [UInt8]) { self.bytes = bytes }

  mutating func next<Number: FixedWidthInteger>() -> Number {
    defer { position += MemoryLayout<Number>.size }
    return bytes.withUnsafeBytes {
      Number(littleEndian: $0.loadUnaligned(fromByteOffset: position, as: Number.self))
    }
  }
}
