import Glibc
import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import MooncakeTestSupport
import Testing

struct MetadataJournalTests {
  /// On a failing disk, not every change writes another copy of everything.
  @Test func writingAnewIsTriedOnceASecond() throws {
    let folder = JournalFolder()
    let isBroken = Box(false)
    let attempts = Box(0)
    var disk = MetadataJournal.Disk()
    disk.syncData = { isBroken.value ? -1 : fdatasync($0) }
    disk.sync = { descriptor in
      attempts.update { $0 += 1 }
      return isBroken.value ? -1 : fsync(descriptor)
    }
    let record = MetadataJournal.Record.put(key: "k", value: [1], lease: 0)
    do {
      let journal = try MetadataJournal(directory: folder.path, disk: disk) { _ in nil }
      isBroken.value = true
      let before = attempts.value
      for _ in 0..<20 {
        journal.append(record)
        #expect(throws: Errno.self) { try journal.commit { [record] } }
      }
      #expect(attempts.value == before + 1)
      isBroken.value = false
      let isBack = eventually {
        journal.append(record)
        return (try? journal.commit { [record] }) != nil
      }
      #expect(isBack)
    }
    var found: [String] = []
    _ = try MetadataJournal(directory: folder.path) {
      found.append("\($0)")
      return nil
    }
    #expect(!found.isEmpty)
  }

  private typealias Record = MetadataJournal.Record

  private static let records: [Record] = [
    .grant(lease: 5, ttlMilliseconds: 10_000), .put(key: "a", value: [1, 0, 255], lease: 5),
    .put(key: "é", value: [], lease: 0), .delete(key: "a"), .revoke(lease: 5),
  ]

  @Test func keepsEverything() throws {
    let folder = JournalFolder()
    try folder.write(Self.records)
    #expect(try folder.read() == Self.records)
    try folder.write(Self.records)
    #expect(try folder.read() == Self.records + Self.records)
  }

  @Test func cutAnywhereKeepsWholeRecords() throws {
    let folder = JournalFolder()
    try folder.write(Self.records)
    let whole = folder.bytes
    let head = MetadataJournalFormat.Head.byteCount
    let markBytes = 38
    for count in head..<(whole.count - markBytes) {
      folder.bytes = Array(whole[..<count])
      let found = try folder.read()
      #expect(found.count < Self.records.count && Self.records.starts(with: found))
      // What was cut off does not come back, and later changes are kept.
      try folder.write([.delete(key: "next")])
      #expect(try folder.read() == found + [.delete(key: "next")])
    }
  }

  @Test func foreignFilesStay() throws {
    let folder = JournalFolder()
    folder.bytes = Array("something else entirely".utf8)
    #expect(throws: MooncakeError.self) { try folder.read() }
    #expect(folder.bytes == Array("something else entirely".utf8))
  }

  @Test func oneServerAtATime() throws {
    let folder = JournalFolder()
    let first = try MetadataJournal(directory: folder.path) { _ in nil }
    #expect(throws: MooncakeError.self) { try folder.read() }
    withExtendedLifetime(first) {}
  }

  @Test func aChildOfAForkDoesNotKeepTheLock() throws {
    let folder = JournalFolder()
    var first: MetadataJournal? = try MetadataJournal(directory: folder.path) { _ in nil }
    typealias Fork = @convention(c) () -> pid_t
    let fork = unsafeBitCast(dlsym(nil, "fork"), to: Fork.self)
    let child = fork()
    if child == 0 {
      pause()
      _exit(0)
    }
    defer {
      kill(child, SIGKILL)
      waitpid(child, nil, 0)
    }
    withExtendedLifetime(first) {}
    first = nil
    #expect(throws: Never.self) { try folder.read() }
  }

  @Test func rewritesShorter() throws {
    let folder = JournalFolder()
    do {
      let journal = try MetadataJournal(directory: folder.path) { _ in nil }
      for index in 0..<1000 {
        journal.append(.put(key: "k", value: [UInt8(index % 256)], lease: 0))
      }
      try journal.commit { [] }
      #expect(!journal.isWorthRewriting(liveBytes: 1 << 20))
      try journal.rewrite([.put(key: "k", value: [9], lease: 0)])
      journal.append(.delete(key: "x"))
      try journal.commit { [] }
    }
    #expect(try folder.read() == [.put(key: "k", value: [9], lease: 0), .delete(key: "x")])
    #expect(folder.bytes.count < 200)
  }

  @Test func missingParentsAreTold() {
    #expect(throws: MooncakeError.self) {
      try MetadataJournal(directory: "/nonexistent/a/b") { _ in nil }
    }
  }
}
