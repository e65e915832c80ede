/// CRC-32 as used by Ethernet and zip.
enum Checksum {
  /// Eight tables of 256 entries, for eight bytes at a time. Never freed.
  nonisolated(unsafe) private static let tables: UnsafePointer<UInt32> = {
    let tables = UnsafeMutablePointer<UInt32>.allocate(capacity: 8 * 256)
    for index in 0..<256 {
      tables[index] = (0..<8).reduce(UInt32(index)) { sum, _ in
        sum & 1 == 0 ? sum >> 1 : sum >> 1 ^ 0xEDB8_8320
      }
    }
    for index in 256..<8 * 256 {
      let sum = tables[index - 256]
      tables[index] = tables[Int(sum & 0xFF)] ^ sum >> 8
    }
    return UnsafePointer(tables)
  }()

  static func prepare() { _ = tables }

  /// The checksum of `bytes`, or of data with checksum `sum` followed by `bytes`.
  static func crc32(_ bytes: UnsafeRawBufferPointer, after sum: UInt32 = 0) -> UInt32 {
    let tables = tables
    var sum = ~sum
    var index = 0
    while bytes.count - index >= 8 {
      let word = bytes.loadUnaligned(fromByteOffset: index, as: UInt64.self).littleEndian
      sum = eight(word ^ UInt64(sum), tables)
      index += 8
    }
    while index < bytes.count {
      sum = tables[Int((sum ^ UInt32(bytes[index])) & 0xFF)] ^ sum >> 8
      index += 1
    }
    return ~sum
  }

  @inline(__always)
  private static func eight(_ word: UInt64, _ tables: UnsafePointer<UInt32>) -> UInt32 {
    var sum: UInt32 = 0
    for place in 0..<8 {
      sum ^= tables[(7 - place) * 256 + Int(word >> UInt64(place * 8) & 0xFF)]
    }
    return sum
  }
}
