import Glibc
import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import Synchronization
import Testing

/// What a crash may leave is cut off; other damage prevents the start and leaves the file alone.
struct MetadataJournalDamageTests {
  private typealias Format = MetadataJournalFormat

  private static let records: [MetadataJournal.Record] = [
    .grant(lease: 5, ttlMilliseconds: 10_000), .put(key: "a", value: [1, 0, 255], lease: 5),
    .put(key: "é", value: [0, 0, 0, 0], lease: 0), .delete(key: "a"), .revoke(lease: 5),
    .put(key: "last", value: [0], lease: 0),
  ]

  /// A complete file, the ends of its head and of each record, and what follows these.
  struct File: CustomTestStringConvertible, Sendable {
    var name: String
    var headBytes: Int
    var bytes: [UInt8]
    var ends: [Int]
    var mark: [UInt8] = []

    var testDescription: String { name }
    var recordBytes: Int { bytes.count - mark.count }
  }

  private static let former: File = {
    var bytes = FormerJournal.head
    var ends: [Int] = []
    for record in records {
      FormerJournal.encode(record, into: &bytes)
      ends.append(bytes.count)
    }
    return File(name: "former", headBytes: FormerJournal.head.count, bytes: bytes, ends: ends)
  }()

  private static let present: File = {
    let folder = JournalFolder()
    try! folder.write(records)
    let bytes = folder.bytes
    var ends: [Int] = []
    for count in Format.Head.byteCount..<bytes.count {
      folder.bytes = Array(bytes[..<count])
      if try! folder.read().count > ends.count { ends.append(count) }
    }
    return File(
      name: "present", headBytes: Format.Head.byteCount, bytes: bytes, ends: ends,
      mark: Array(bytes[ends.last!...]))
  }()

  static let files = [former, present]

  /// The tests' own writer of old files must not hide that they are unreadable now.
  @Test func formerFilesAreWhatFormerVersionsWrote() {
    let digits = Array(
      """
      6d6f6f6e63616b65206d6574616461746120320a16000000dce5bde5ad35569d0305000000000000\
      00000000001027000000000000a512000000ee12ea42f093fd4e0105000000000000000100000061\
      0100ffa5140000005d8b8457be5a34e301000000000000000002000000c3a900000000a50f000000\
      526c536e607a57a70200000000000000000100000061a50e000000a812847366f636710405000000\
      0000000000000000a51300000008e0ab538274d144010000000000000000040000006c61737400a5
      """)
    let bytes = stride(from: 0, to: digits.count, by: 2).map {
      UInt8(String(digits[$0...($0 + 1)]), radix: 16)
    }
    #expect(Self.former.bytes == bytes)
  }

  @Test(arguments: files) func everyFlippedBitStopsTheStart(file: File) throws {
    let folder = JournalFolder()
    let starts = [0, file.headBytes] + file.ends.dropLast()
    for index in 0..<file.recordBytes {
      for bit in 0..<8 {
        var bytes = file.bytes
        bytes[index] ^= 1 << UInt8(bit)
        folder.bytes = bytes
        var offset = try #require(starts.last { $0 <= index })
        // This looks like an old file, which is invalid after the first line.
        if bytes.starts(with: FormerJournal.head) { offset = max(offset, FormerJournal.head.count) }
        let text = try #require(folder.refusal(), "byte \(index), bit \(bit)")
        #expect(text.contains("\(folder.file): byte \(offset) of \(bytes.count): "), "\(text)")
        #expect(text.contains("move the file away"), "\(text)")
        #expect(folder.bytes == bytes)
      }
    }
  }

  @Test func flippedBitsInTheMarkAreNoLoss() throws {
    let folder = JournalFolder()
    let file = Self.present
    for index in file.recordBytes..<file.bytes.count {
      for bit in 0..<8 {
        var bytes = file.bytes
        bytes[index] ^= 1 << UInt8(bit)
        folder.bytes = bytes
        #expect(try folder.read() == Self.records)
        // The mark has been restored.
        #expect(folder.bytes.count == file.bytes.count)
      }
    }
  }

  @Test(arguments: files) func everyLengthKeepsEveryWholeRecord(file: File) throws {
    let folder = JournalFolder()
    for count in 0...file.recordBytes {
      let wholeCount = file.ends.filter { $0 <= count }.count
      // The file may have got its length before its contents.
      for zeroCount in [0, 1, 7, 5000] {
        folder.bytes = file.bytes[..<count] + [UInt8](repeating: 0, count: zeroCount)
        if count < file.headBytes && count + zeroCount > file.headBytes {
          // This may have been longer than a head.
          #expect(folder.refusal() != nil || count + zeroCount <= Format.Head.byteCount)
          continue
        }
        #expect(
          try folder.read() == Array(Self.records[..<wholeCount]), "\(count) and \(zeroCount)")
        if count < file.headBytes {
          #expect(folder.bytes.count == Format.Head.byteCount)
          continue
        }
        let kept = max(file.headBytes, file.ends.last { $0 <= count } ?? 0)
        #expect(folder.bytes.prefix(kept) == file.bytes[..<kept])
        let isMarked = file.mark != [] && kept > file.headBytes
        #expect(folder.bytes.count == kept + (isMarked ? file.mark.count : 0))
      }
    }
  }

  @Test(arguments: files) func lostStretchesStopTheStart(file: File) throws {
    let folder = JournalFolder()
    let bytes = file.bytes
    // With the mark, even the loss of the records' last bytes is noticed.
    let end = file.mark == [] ? bytes.count - 1 : file.recordBytes + 1
    for start in file.headBytes..<(end - 1) {
      for stop in [start + 1, start + 8, start + 30] where stop < end {
        let damaged = bytes[..<start] + [UInt8](repeating: 0, count: stop - start) + bytes[stop...]
        if Array(damaged) == bytes { continue }
        folder.bytes = Array(damaged)
        #expect(folder.refusal() != nil, "\(start)..<\(stop)")
      }
    }
  }

  @Test func newerVersionsStopTheStart() throws {
    let folder = JournalFolder()
    folder.bytes = Array("mooncake metadata 31\nwhat it has".utf8)
    #expect(folder.refusal()?.contains("format 31") == true)
    folder.bytes = Array("mooncake metadata 1\n".utf8)
    #expect(folder.refusal()?.contains("format 1,") == true)
    // Earlier versions report this version as it would report the next.
    #expect(Self.present.bytes.starts(with: "mooncake metadata 3\n".utf8))
    folder.bytes = Array("mooncake metadata 4\n".utf8) + Self.present.bytes[20...]
    #expect(folder.refusal()?.contains("format 4,") == true)
    var bytes = Self.former.bytes
    FormerJournal.encode(kind: 9, number: 1, value: [1, 2, 3], into: &bytes)
    FormerJournal.encode(.delete(key: "behind"), into: &bytes)
    folder.bytes = bytes
    try expectUnknownKind(in: folder, at: Self.former.bytes.count)
    // Even if nothing after it shows that it was safe.
    let head = Format.Head(file: 7)
    bytes = head.bytes
    let commit = Format.Commit(file: 7, run: 1, safeBytes: bytes.count)
    Format.encode(kind: 9, number: 1, value: [1, 2, 3], at: bytes.count, of: commit, into: &bytes)
    folder.bytes = bytes
    try expectUnknownKind(in: folder, at: head.safeBytes)
  }

  private func expectUnknownKind(in folder: JournalFolder, at offset: Int) throws {
    let bytes = folder.bytes
    let text = try #require(folder.refusal())
    #expect(text.contains("kind 9") && text.contains("byte \(offset) of"), "\(text)")
    #expect(folder.bytes == bytes)
  }

  @Test func recordsThatMakeNoSenseStopTheStart() throws {
    let grant = MetadataJournal.Record.grant(lease: 7, ttlMilliseconds: 1000)
    for (records, problem) in [
      ([.put(key: "a", value: [], lease: 7)], "no earlier record has granted"),
      ([grant, grant], "granted a second time"),
    ] {
      let folder = JournalFolder()
      try folder.write(records)
      var options = MetadataServer.Options()
      options.directory = folder.path
      let bytes = folder.bytes
      let error = try #require(throws: MooncakeError.self) { try MetadataServer(options) }
      for word in [folder.file, problem, "move the file away"] {
        #expect(error.message.contains(word), "\(error.message)")
      }
      #expect(folder.bytes == bytes)
    }
  }

  @Test func namesAreSafeBeforeTheFirstRecord() throws {
    let folder = JournalFolder()
    let synced = Lock<[ino_t]>([])
    var disk = MetadataJournal.Disk()
    disk.sync = { descriptor in
      var status = stat()
      fstat(descriptor, &status)
      synced.withLock { $0.append(status.st_ino) }
      return fsync(descriptor)
    }
    let journal = try MetadataJournal(directory: folder.path, disk: disk) { _ in nil }
    for path in [folder.path, folder.path + "/.."] {
      var status = stat()
      stat(path, &status)
      #expect(synced.withLock { $0.contains(status.st_ino) }, "\(path)")
    }
    withExtendedLifetime(journal) {}
  }

  @Test func failingDisksStopTheStart() throws {
    let folder = JournalFolder()
    var disk = MetadataJournal.Disk()
    disk.sync = { _ in
      errno = EIO
      return -1
    }
    #expect(throws: MooncakeError.self) {
      try MetadataJournal(directory: folder.path, disk: disk) { _ in nil }
    }
    #expect(try folder.read() == [])
  }

  @Test(arguments: files) func whatIsReadIsSafeBeforeItIsServed(file: File) throws {
    let folder = JournalFolder()
    // With half a record, which is cut off.
    for bytes in [file.bytes, file.bytes + [1, 2, 3]] {
      folder.bytes = bytes
      let synced = Lock<[Int]>([])
      var disk = MetadataJournal.Disk()
      disk.syncData = { descriptor in
        var status = stat()
        fstat(descriptor, &status)
        synced.withLock { $0.append(Int(status.st_size)) }
        return fdatasync(descriptor)
      }
      do { _ = try MetadataJournal(directory: folder.path, disk: disk) { _ in nil } }
      #expect(synced.withLock { $0 } == [file.bytes.count])
      disk.syncData = { _ in
        errno = EIO
        return -1
      }
      let error = try #require(throws: MooncakeError.self) {
        try MetadataJournal(directory: folder.path, disk: disk) { _ in nil }
      }
      #expect(error.message.contains(folder.path), "\(error.message)")
      #expect(try folder.read() == Self.records)
    }
  }

  @Test func filesThatCannotBeCutStopTheStart() throws {
    let folder = JournalFolder()
    let bytes = Self.present.bytes + [1, 2, 3]
    folder.bytes = bytes
    var disk = MetadataJournal.Disk()
    disk.truncate = { _, _ in
      errno = EIO
      return -1
    }
    let error = try #require(throws: MooncakeError.self) {
      try MetadataJournal(directory: folder.path, disk: disk) { _ in nil }
    }
    #expect(error.message.contains("cutting"), "\(error.message)")
    #expect(folder.bytes == bytes)
  }
}
