/// The file format of a metadata server's journal: a head, then one record after another.
///
/// The head is a line of text, a random number for the file, how many of its bytes were safe on
/// disk before it got its name, and a checksum.
///
/// A record is a header and the rest: kind, number, length of the key, key, value, end mark. The
/// header has the length and a checksum of the rest; how many bytes of the file were safe when the
/// record was written; a random number for the server's run; and its own checksum, which also
/// covers the file's number and the record's position. So neither remains of other files on the
/// disk nor a client's value can pass for a record.
///
/// After each safe commit comes a mark, a record that changes nothing and that nobody waits for. It
/// says what is safe even if no other commit follows; it becomes safe itself with the next commit,
/// whose records give the same number of bytes. Safe bytes are never overwritten, so a copy taken
/// at any time is whole.
package enum MetadataJournalFormat {
  /// One change, or a mark.
  package enum Record: Equatable, Sendable {
    case put(key: String, value: [UInt8], lease: UInt64)
    case delete(key: String)
    case grant(lease: UInt64, ttlMilliseconds: UInt64)
    case revoke(lease: UInt64)
    case mark
  }

  /// The beginning of a file of this version.
  package struct Head: Equatable, Sendable {
    package var file: UInt64
    package var safeBytes: Int

    package static var byteCount: Int { line.utf8.count + 20 }

    package init(file: UInt64, safeBytes: Int = Head.byteCount) {
      self.file = file
      self.safeBytes = safeBytes
    }

    package var bytes: [UInt8] {
      var bytes = Array(line.utf8)
      bytes.append(number: file)
      bytes.append(number: UInt64(safeBytes))
      bytes.append(number: bytes.withUnsafeBytes { Checksum.crc32($0) })
      return bytes
    }
  }

  /// What was found at the beginning of a file.
  package enum Beginning: Equatable {
    case head(Head)
    /// Format 2, whose records do not say what was safe.
    case former(next: Int)
    /// Less than a head, as a crash leaves it while the file is created.
    case unfinished
    /// Written by another version of the server.
    case version(String)
    case foreign
    case damage
  }

  /// The commit that a record belongs to.
  package struct Commit: Equatable, Sendable {
    package var file: UInt64
    package var run: UInt32
    package var safeBytes: Int

    package init(file: UInt64, run: UInt32, safeBytes: Int) {
      self.file = file
      self.run = run
      self.safeBytes = safeBytes
    }
  }

  private static let name = "mooncake metadata "
  private static let line = "\(name)3\n"
  private static let formerLine = "\(name)2\n"
  private static let fixedBytes = 14
  private static let endMark: UInt8 = 0xA5
  private static let markKind: UInt8 = 5

  /// Examines the first bytes of a file: as many as a head has, or all if there are fewer.
  package static func readBeginning(
    _ bytes: UnsafeRawBufferPointer, fileBytes: Int
  ) -> Beginning {
    if let head = readHead(bytes) { return .head(head) }
    if bytes.starts(with: formerLine.utf8) { return .former(next: formerLine.utf8.count) }
    if isUnfinished(bytes, fileBytes: fileBytes) { return .unfinished }
    if bytes.starts(with: line.utf8) { return .damage }
    let digits = bytes.dropFirst(name.utf8.count).prefix { (48...57).contains($0) }
    let end = digits.endIndex
    guard bytes.starts(with: name.utf8), !digits.isEmpty, end < bytes.count, bytes[end] == 10 else {
      return .foreign
    }
    return .version(String(decoding: digits, as: UTF8.self))
  }

  private static func readHead(_ bytes: UnsafeRawBufferPointer) -> Head? {
    let sumOffset = Head.byteCount - 4
    guard bytes.count >= Head.byteCount, bytes.starts(with: line.utf8) else { return nil }
    let sum = Checksum.crc32(UnsafeRawBufferPointer(rebasing: bytes[..<sumOffset]))
    if bytes.number(at: sumOffset, UInt32.self) != sum { return nil }
    return Head(
      file: bytes.number(at: sumOffset - 16, UInt64.self),
      safeBytes: Int(clamping: bytes.number(at: sumOffset - 8, UInt64.self)))
  }

  /// Whether the file is only part of a head, possibly followed by zeros.
  private static func isUnfinished(_ bytes: UnsafeRawBufferPointer, fileBytes: Int) -> Bool {
    if fileBytes > Head.byteCount { return false }
    let count = bytes.lastIndex { $0 != 0 }.map { $0 + 1 } ?? 0
    let text = bytes[..<count]
    if count >= line.utf8.count && count < Head.byteCount && text.starts(with: line.utf8) {
      return true
    }
    return line.utf8.starts(with: text)
      || fileBytes <= formerLine.utf8.count && formerLine.utf8.starts(with: text)
  }

  // MARK: Writing

  /// Appends a record that will be written at a certain position of the file.
  package static func encode(
    _ record: Record, at position: Int, of commit: Commit, into bytes: inout [UInt8]
  ) {
    switch record {
    case .put(let key, let value, let lease):
      encode(kind: 1, number: lease, key: key, value: value, at: position, of: commit, into: &bytes)
    case .delete(let key):
      encode(kind: 2, key: key, at: position, of: commit, into: &bytes)
    case .grant(let lease, let ttl):
      var value: [UInt8] = []
      value.append(number: ttl)
      encode(kind: 3, number: lease, value: value, at: position, of: commit, into: &bytes)
    case .revoke(let lease):
      encode(kind: 4, number: lease, at: position, of: commit, into: &bytes)
    case .mark:
      encode(kind: markKind, at: position, of: commit, into: &bytes)
    }
  }

  package static func encode(
    kind: UInt8, number: UInt64 = 0, key: String = "", value: [UInt8] = [], at position: Int,
    of commit: Commit, into bytes: inout [UInt8]
  ) {
    let start = bytes.count
    bytes.append(contentsOf: repeatElement(0, count: Header.byteCount))
    bytes.append(kind)
    bytes.append(number: number)
    bytes.append(number: UInt32(key.utf8.count))
    bytes.append(contentsOf: key.utf8)
    bytes.append(contentsOf: value)
    bytes.append(endMark)
    bytes.withUnsafeMutableBytes { all in
      let rest = UnsafeRawBufferPointer(rebasing: all[(start + Header.byteCount)...])
      let header = Header(
        length: rest.count, sum: Checksum.crc32(rest), safeBytes: commit.safeBytes,
        run: commit.run)
      header.store(
        in: UnsafeMutableRawBufferPointer(rebasing: all[start...]), at: position, of: commit.file)
    }
  }
}

// MARK: Reading

extension MetadataJournalFormat {
  /// Reads the rest of a record; nil if this version does not know its kind.
  static func decode(_ rest: UnsafeRawBufferPointer) -> Record? {
    guard rest.count >= fixedBytes, rest.last == endMark else { return nil }
    let keyStart = fixedBytes - 1
    let keyCount = Int(rest.number(at: 9, UInt32.self))
    guard keyCount <= rest.count - fixedBytes,
      let key = String(validating: rest[keyStart..<(keyStart + keyCount)], as: UTF8.self)
    else { return nil }
    let value = UnsafeRawBufferPointer(rebasing: rest[(keyStart + keyCount)..<(rest.count - 1)])
    let number = rest.number(at: 1, UInt64.self)
    switch rest[0] {
    case 1: return .put(key: key, value: Array(value), lease: number)
    case 2: return .delete(key: key)
    case 3 where value.count == 8:
      return .grant(lease: number, ttlMilliseconds: value.number(at: 0, UInt64.self))
    case 4: return .revoke(lease: number)
    case markKind: return .mark
    default: return nil
    }
  }

  /// The header of a record.
  struct Header {
    var length: Int
    var sum: UInt32
    var safeBytes: Int
    var run: UInt32

    static let byteCount = 24
    static let formerByteCount = 12

    init(length: Int, sum: UInt32, safeBytes: Int, run: UInt32) {
      self.length = length
      self.sum = sum
      self.safeBytes = safeBytes
      self.run = run
    }

    /// Reads a header at a position of a file; nil if its checksum does not match. `file` is nil
    /// for format 2, which has only length and checksums.
    init?(_ bytes: UnsafeRawBufferPointer, at position: Int, of file: UInt64?) {
      let sumOffset = (file == nil ? Self.formerByteCount : Self.byteCount) - 4
      let covered = UnsafeRawBufferPointer(rebasing: bytes[..<sumOffset])
      let sum = Self.checksum(covered, position, file)
      if bytes.number(at: sumOffset, UInt32.self) != sum { return nil }
      length = Int(bytes.number(at: 0, UInt32.self))
      self.sum = bytes.number(at: 4, UInt32.self)
      safeBytes = file == nil ? 0 : Int(clamping: bytes.number(at: 8, UInt64.self))
      run = file == nil ? 0 : bytes.number(at: 16, UInt32.self)
    }

    func store(in bytes: UnsafeMutableRawBufferPointer, at position: Int, of file: UInt64) {
      bytes.storeBytes(of: UInt32(length).littleEndian, as: UInt32.self)
      bytes.storeBytes(of: sum.littleEndian, toByteOffset: 4, as: UInt32.self)
      bytes.storeBytes(of: UInt64(safeBytes).littleEndian, toByteOffset: 8, as: UInt64.self)
      bytes.storeBytes(of: run.littleEndian, toByteOffset: 16, as: UInt32.self)
      let covered = UnsafeRawBufferPointer(rebasing: bytes[..<(Self.byteCount - 4)])
      bytes.storeBytes(
        of: Self.checksum(covered, position, file).littleEndian, toByteOffset: covered.count,
        as: UInt32.self)
    }

    private static func checksum(
      _ covered: UnsafeRawBufferPointer, _ position: Int, _ file: UInt64?
    ) -> UInt32 {
      guard let file else { return Checksum.crc32(covered) }
      let place = (file.littleEndian, UInt64(position).littleEndian)
      return Checksum.crc32(covered, after: withUnsafeBytes(of: place) { Checksum.crc32($0) })
    }

    func isSameCommit(as other: Header) -> Bool {
      safeBytes == other.safeBytes && run == other.run
    }

    /// Whether the bytes, read as a header, would give a number in this range: a quick check before
    /// reading one.
    static func mayTell(_ bytes: UnsafeRawBufferPointer, safeBytes: ClosedRange<Int>) -> Bool {
      safeBytes.contains(Int(clamping: bytes.number(at: 8, UInt64.self)))
    }
  }
}

extension UnsafeRawBufferPointer {
  /// Numbers in files are little-endian.
  func number<Number: FixedWidthInteger & BitwiseCopyable>(
    at offset: Int, _ type: Number.Type
  ) -> Number {
    Number(littleEndian: loadUnaligned(fromByteOffset: offset, as: type))
  }
}

extension [UInt8] {
  fileprivate mutating func append(number: some FixedWidthInteger) {
    Swift.withUnsafeBytes(of: number.littleEndian) { append(contentsOf: $0) }
  }
}
