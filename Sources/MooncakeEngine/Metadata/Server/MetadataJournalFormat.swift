/// How the changes of a metadata server lie in a file: a head, then record behind record.
///
/// A record is its length, a checksum of the rest, a checksum of these two, and the rest: kind,
/// number, length of the key, key, value, end mark. The length has a checksum of its own, so that a
/// record that ends too early is told from one whose length was damaged. The end mark is not zero,
/// so that no whole record ends in the zeros that some file systems leave behind a crash.
package enum MetadataJournalFormat {
  /// One change.
  package enum Record: Equatable, Sendable {
    case put(key: String, value: [UInt8], lease: UInt64)
    case delete(key: String)
    case grant(lease: UInt64, ttlMilliseconds: UInt64)
    case revoke(lease: UInt64)
  }

  /// What stands at a place of a file.
  package enum Found: Equatable {
    case record(Record, next: Int)
    /// Nothing, or only the beginning of a record: what a crash leaves of an unfinished write.
    case beginning
    /// Bytes that no crash leaves, and what is wrong with them.
    case damage(String)
  }

  /// What a file begins with.
  package enum Head: Equatable {
    case present(next: Int)
    /// Less than a head, as a crash leaves it when the file was just made.
    case unfinished
    /// Written by another version of the server.
    case version(String)
    case foreign
  }

  private static let version = "2"
  private static let name = "mooncake metadata "
  private static let headerBytes = 12
  private static let fixedBytes = 14
  private static let endMark: UInt8 = 0xA5

  package static var head: [UInt8] { Array("\(name)\(version)\n".utf8) }

  /// Looks at the first bytes of a file, without zeros in which it ends.
  package static func readHead(_ bytes: UnsafeRawBufferPointer, fileBytes: Int) -> Head {
    if bytes.starts(with: head) { return .present(next: head.count) }
    if fileBytes <= head.count, head.starts(with: bytes) { return .unfinished }
    let digits = bytes.dropFirst(name.utf8.count).prefix(20).prefix { (48...57).contains($0) }
    let end = digits.endIndex
    guard bytes.starts(with: name.utf8), !digits.isEmpty, end < bytes.count, bytes[end] == 10 else {
      return .foreign
    }
    return .version(String(decoding: digits, as: UTF8.self))
  }

  package static func encode(_ record: Record, into bytes: inout [UInt8]) {
    let (kind, number, key, value): (UInt8, UInt64, String, [UInt8]) =
      switch record {
      case .put(let key, let value, let lease): (1, lease, key, value)
      case .delete(let key): (2, 0, key, [])
      case .grant(let lease, let ttl): (3, lease, "", Self.bytes(ttl, 8))
      case .revoke(let lease): (4, lease, "", [])
      }
    encode(kind: kind, number: number, key: Array(key.utf8), value: value, into: &bytes)
  }

  package static func encode(
    kind: UInt8, number: UInt64, key: [UInt8], value: [UInt8], into bytes: inout [UInt8]
  ) {
    let start = bytes.count
    let length = fixedBytes + key.count + value.count
    bytes.reserveCapacity(start + headerBytes + length)
    bytes += [UInt8](repeating: 0, count: headerBytes)
    bytes.append(kind)
    bytes += Self.bytes(number, 8)
    bytes += Self.bytes(UInt64(key.count), 4)
    bytes += key
    bytes += value
    bytes.append(endMark)
    let sum = bytes.withUnsafeBytes {
      Checksum.crc32(UnsafeRawBufferPointer(rebasing: $0[(start + headerBytes)...]))
    }
    let header = Self.bytes(UInt64(length), 4) + Self.bytes(UInt64(sum), 4)
    let headerSum = header.withUnsafeBytes { Checksum.crc32($0) }
    bytes.replaceSubrange(
      start..<(start + headerBytes), with: header + Self.bytes(UInt64(headerSum), 4))
  }

  /// Reads what stands at a position of some bytes of a file, without zeros in which it ends.
  package static func read(_ bytes: UnsafeRawBufferPointer, at position: Int) -> Found {
    let left = bytes.count - position
    if left < headerBytes { return .beginning }
    let header = UnsafeRawBufferPointer(rebasing: bytes[position..<(position + headerBytes - 4)])
    guard UInt64(Checksum.crc32(header)) == number(bytes, position + headerBytes - 4, 4) else {
      return .damage("the header of a record does not match its checksum")
    }
    let length = Int(number(header, 0, 4))
    if length > left - headerBytes { return .beginning }
    let start = position + headerBytes
    let rest = UnsafeRawBufferPointer(rebasing: bytes[start..<(start + length)])
    guard UInt64(Checksum.crc32(rest)) == number(header, 4, 4) else {
      return .damage("a record of \(headerBytes + length) bytes does not match its checksum")
    }
    return decode(rest).map { .record($0, next: start + length) }
      ?? .damage(
        "a record of kind \(rest.first ?? 0) is none that this version knows: a newer one may "
          + "have written it")
  }

  private static func decode(_ rest: UnsafeRawBufferPointer) -> Record? {
    guard rest.count >= fixedBytes, rest.last == endMark else { return nil }
    let keyStart = fixedBytes - 1
    let keyCount = Int(number(rest, 9, 4))
    guard keyCount <= rest.count - fixedBytes,
      let key = String(validating: rest[keyStart..<(keyStart + keyCount)], as: UTF8.self)
    else { return nil }
    let value = UnsafeRawBufferPointer(rebasing: rest[(keyStart + keyCount)..<(rest.count - 1)])
    let lease = number(rest, 1, 8)
    switch rest[0] {
    case 1: return .put(key: key, value: Array(value), lease: lease)
    case 2: return .delete(key: key)
    case 3 where value.count == 8:
      return .grant(lease: lease, ttlMilliseconds: number(value, 0, 8))
    case 4: return .revoke(lease: lease)
    default: return nil
    }
  }

  private static func bytes(_ number: UInt64, _ count: Int) -> [UInt8] {
    (0..<count).map { UInt8(truncatingIfNeeded: number >> UInt64($0 * 8)) }
  }

  private static func number(
    _ bytes: UnsafeRawBufferPointer, _ position: Int, _ count: Int
  ) -> UInt64 {
    (0..<count).reduce(0) { $0 | UInt64(bytes[position + $1]) << UInt64($1 * 8) }
  }
}
