import MooncakeMetadata

/// Journals of format 2, as written by earlier versions of the server.
enum FormerJournal {
  static let head = Array("mooncake metadata 2\n".utf8)

  static func encode(_ record: MetadataJournal.Record, into bytes: inout [UInt8]) {
    switch record {
    case .put(let key, let value, let lease):
      encode(kind: 1, number: lease, key: key, value: value, into: &bytes)
    case .delete(let key): encode(kind: 2, key: key, into: &bytes)
    case .grant(let lease, let ttl):
      encode(kind: 3, number: lease, value: number(ttl, 8), into: &bytes)
    case .revoke(let lease): encode(kind: 4, number: lease, into: &bytes)
    case .mark: break
    }
  }

  static func encode(
    kind: UInt8, number: UInt64 = 0, key: String = "", value: [UInt8] = [],
    into bytes: inout [UInt8]
  ) {
    var rest = [kind]
    rest += Self.number(number, 8)
    rest += Self.number(UInt64(key.utf8.count), 4)
    rest += Array(key.utf8)
    rest += value
    rest.append(0xA5)
    var header = Self.number(UInt64(rest.count), 4)
    header += Self.number(UInt64(crc32(rest)), 4)
    header += Self.number(UInt64(crc32(header)), 4)
    bytes += header
    bytes += rest
  }

  private static func number(_ number: UInt64, _ count: Int) -> [UInt8] {
    (0..<count).map { UInt8(truncatingIfNeeded: number >> UInt64($0 * 8)) }
  }

  private static func crc32(_ bytes: [UInt8]) -> UInt32 {
    var sum = UInt32.max
    for byte in bytes {
      sum ^= UInt32(byte)
      for _ in 0..<8 { sum = sum & 1 == 0 ? sum >> 1 : sum >> 1 ^ 0xEDB8_8320 }
    }
    return ~sum
  }
}
