import Glibc
import MooncakeEngine
import MooncakeSystem
import Synchronization
import Testing

/// What a crash leaves is cut off; what no crash leaves stops the start, and the file stays.
struct MetadataJournalDamageTests {
  private typealias Format = MetadataJournalFormat

  private static let records: [MetadataJournal.Record] = [
    .grant(lease: 5, ttlMilliseconds: 10_000), .put(key: "a", value: [1, 0, 255], lease: 5),
    .put(key: "é", value: [0, 0, 0, 0], lease: 0), .delete(key: "a"), .revoke(lease: 5),
    .put(key: "last", value: [0], lease: 0),
  ]

  /// The whole file, and where each of its records ends.
  private static let file: (bytes: [UInt8], ends: [Int]) = {
    var bytes = Format.head
    var ends: [Int] = []
    for record in records {
      Format.encode(record, into: &bytes)
      ends.append(bytes.count)
    }
    return (bytes, ends)
  }()

  @Test func everyFlippedBitStopsTheStart() throws {
    let folder = JournalFolder()
    let starts = [0, Format.head.count] + Self.file.ends.dropLast()
    for index in Self.file.bytes.indices {
      for bit in 0..<8 {
        var bytes = Self.file.bytes
        bytes[index] ^= 1 << UInt8(bit)
        folder.bytes = bytes
        let offset = try #require(starts.last { $0 <= index })
        let text = try #require(folder.refusal(), "byte \(index), bit \(bit)")
        #expect(text.contains("\(folder.file): byte \(offset) of \(bytes.count): "), "\(text)")
        #expect(text.contains("move the file away"), "\(text)")
        #expect(folder.bytes == bytes)
      }
    }
  }

  @Test func everyLengthKeepsEveryWholeRecord() throws {
    let folder = JournalFolder()
    for count in 0...Self.file.bytes.count {
      let wholeCount = Self.file.ends.filter { $0 <= count }.count
      // The file may have got its length before its contents.
      for zeroCount in [0, 1, 7, 5000] {
        folder.bytes = Self.file.bytes[..<count] + [UInt8](repeating: 0, count: zeroCount)
        if count < Format.head.count && count + zeroCount > Format.head.count {
          // This may have been more than a head.
          #expect(folder.refusal() != nil)
          continue
        }
        #expect(
          try folder.read() == Array(Self.records[..<wholeCount]), "\(count) and \(zeroCount)")
        let kept = max(Format.head.count, Self.file.ends.last { $0 <= count } ?? 0)
        #expect(folder.bytes == Array(Self.file.bytes[..<kept]))
      }
    }
  }

  @Test func lostStretchesStopTheStart() throws {
    let folder = JournalFolder()
    let bytes = Self.file.bytes
    for start in Format.head.count..<(bytes.count - 1) {
      for end in [start + 1, start + 8, start + 30] where end < bytes.count - 1 {
        let zeros = [UInt8](repeating: 0, count: end - start)
        let damaged = bytes[..<start] + zeros + bytes[end...]
        if Array(damaged) == bytes { continue }
        folder.bytes = Array(damaged)
        #expect(folder.refusal() != nil, "\(start)..<\(end)")
      }
    }
  }

  @Test func newerVersionsStopTheStart() throws {
    let folder = JournalFolder()
    folder.bytes = Array("mooncake metadata 31\nwhat it has".utf8)
    #expect(folder.refusal()?.contains("format 31") == true)
    folder.bytes = Array("mooncake metadata 1\n".utf8)
    #expect(folder.refusal()?.contains("format 1,") == true)
    var bytes = Self.file.bytes
    Format.encode(kind: 9, number: 1, key: [], value: [1, 2, 3], into: &bytes)
    Format.encode(.delete(key: "behind"), into: &bytes)
    folder.bytes = bytes
    let text = try #require(folder.refusal())
    #expect(text.contains("kind 9") && text.contains("byte \(Self.file.bytes.count) of"))
    #expect(folder.bytes == bytes)
  }

  @Test func recordsThatMakeNoSenseStopTheStart() throws {
    let grant = MetadataJournal.Record.grant(lease: 7, ttlMilliseconds: 1000)
    for (records, problem) in [
      ([.put(key: "a", value: [], lease: 7)], "no record before has granted"),
      ([grant, grant], "granted a second time"),
    ] {
      let folder = JournalFolder()
      try folder.write(records)
      var options = MetadataServer.Options()
      options.directory = folder.path
      let bytes = folder.bytes
      let error = try #require(throws: EngineError.self) { try MetadataServer(options) }
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
    #expect(throws: EngineError.self) {
      try MetadataJournal(directory: folder.path, disk: disk) { _ in nil }
    }
    #expect(try folder.read() == [])
  }

  @Test func whatIsReadIsSafeBeforeItIsServed() throws {
    let folder = JournalFolder()
    // With half a record, which is cut off.
    for bytes in [Self.file.bytes, Self.file.bytes + [1, 2, 3]] {
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
      #expect(synced.withLock { $0 } == [Self.file.bytes.count])
      disk.syncData = { _ in
        errno = EIO
        return -1
      }
      let error = try #require(throws: EngineError.self) {
        try MetadataJournal(directory: folder.path, disk: disk) { _ in nil }
      }
      #expect(error.message.contains(folder.path), "\(error.message)")
      #expect(try folder.read() == Self.records)
    }
  }

  @Test func filesThatCannotBeCutStopTheStart() throws {
    let folder = JournalFolder()
    let bytes = Self.file.bytes + [1, 2, 3]
    folder.bytes = bytes
    var disk = MetadataJournal.Disk()
    disk.truncate = { _, _ in
      errno = EIO
      return -1
    }
    let error = try #require(throws: EngineError.self) {
      try MetadataJournal(directory: folder.path, disk: disk) { _ in nil }
    }
    #expect(error.message.contains("cutting"), "\(error.message)")
    #expect(folder.bytes == bytes)
  }
}
