import Glibc
import MooncakeEngine
import MooncakeSystem
import Testing

/// A folder that is removed in the end.
private final class Folder {
  let path: String

  init() {
    var template = Array("/tmp/journal-XXXXXX".utf8CString)
    path = template.withUnsafeMutableBufferPointer { String(cString: mkdtemp($0.baseAddress!)!) }
  }

  var file: String { path + "/journal" }

  var bytes: [UInt8] {
    get {
      guard let file = try? FileDescriptor.open(file, flags: O_RDONLY) else { return [] }
      var bytes = [UInt8](repeating: 0, count: 1 << 20)
      let count = bytes.withUnsafeMutableBytes { read(file.rawValue, $0.baseAddress, $0.count) }
      return Array(bytes.prefix(max(0, count)))
    }
    set {
      let file = try! FileDescriptor.open(file, flags: O_RDWR | O_CREAT | O_TRUNC)
      _ = newValue.withUnsafeBytes { write(file.rawValue, $0.baseAddress, $0.count) }
    }
  }

  deinit {
    for name in ["journal", "journal.new", "lock"] { unlink("\(path)/\(name)") }
    rmdir(path)
  }
}

struct MetadataJournalTests {
  private typealias Record = MetadataJournal.Record

  private static let records: [Record] = [
    .grant(lease: 5, ttlMilliseconds: 10_000), .put(key: "a", value: [1, 0, 255], lease: 5),
    .put(key: "é", value: [], lease: 0), .delete(key: "a"), .revoke(lease: 5),
  ]

  private func read(_ folder: Folder) throws -> [Record] {
    var found: [Record] = []
    _ = try MetadataJournal(directory: folder.path, limits: MetadataLimits()) { found.append($0) }
    return found
  }

  private func write(_ folder: Folder, _ records: [Record]) throws {
    let journal = try MetadataJournal(directory: folder.path, limits: MetadataLimits()) { _ in }
    for record in records { journal.append(record) }
    try journal.commit { [] }
  }

  @Test func keepsEverything() throws {
    let folder = Folder()
    try write(folder, Self.records)
    #expect(try read(folder) == Self.records)
    try write(folder, Self.records)
    #expect(try read(folder) == Self.records + Self.records)
  }

  @Test func cutAnywhereKeepsWholeRecords() throws {
    let folder = Folder()
    try write(folder, Self.records)
    let whole = folder.bytes
    let head = Array("mooncake metadata 1\n".utf8).count
    for count in head..<whole.count {
      folder.bytes = Array(whole[..<count])
      let found = try read(folder)
      #expect(found.count < Self.records.count && Self.records.starts(with: found))
      // What was cut off does not come back, and what comes next is kept.
      try write(folder, [.delete(key: "next")])
      #expect(try read(folder) == found + [.delete(key: "next")])
    }
  }

  @Test func damageEndsTheReading() throws {
    let folder = Folder()
    try write(folder, Self.records)
    let whole = folder.bytes
    for index in Array("mooncake metadata 1\n".utf8).count..<whole.count {
      var bytes = whole
      bytes[index] ^= 0x10
      folder.bytes = bytes
      #expect(Self.records.starts(with: try read(folder)))
    }
  }

  @Test func foreignFilesStay() throws {
    let folder = Folder()
    folder.bytes = Array("something else entirely".utf8)
    #expect(throws: EngineError.self) { try read(folder) }
    #expect(folder.bytes == Array("something else entirely".utf8))
  }

  @Test func oneServerAtATime() throws {
    let folder = Folder()
    let first = try MetadataJournal(directory: folder.path, limits: MetadataLimits()) { _ in }
    #expect(throws: EngineError.self) { try read(folder) }
    withExtendedLifetime(first) {}
  }

  @Test func aChildOfAForkDoesNotKeepTheLock() throws {
    let folder = Folder()
    var first: MetadataJournal? = try MetadataJournal(
      directory: folder.path, limits: MetadataLimits()
    ) { _ in }
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
    #expect(throws: Never.self) { try read(folder) }
  }

  @Test func rewritesShorter() throws {
    let folder = Folder()
    do {
      let journal = try MetadataJournal(directory: folder.path, limits: MetadataLimits()) { _ in }
      for index in 0..<1000 {
        journal.append(.put(key: "k", value: [UInt8(index % 256)], lease: 0))
      }
      try journal.commit { [] }
      #expect(!journal.isWorthRewriting(liveBytes: 1 << 20))
      try journal.rewrite([.put(key: "k", value: [9], lease: 0)])
      journal.append(.delete(key: "x"))
      try journal.commit { [] }
    }
    #expect(try read(folder) == [.put(key: "k", value: [9], lease: 0), .delete(key: "x")])
    #expect(folder.bytes.count < 200)
  }

  @Test func missingParentsAreTold() {
    #expect(throws: EngineError.self) {
      try MetadataJournal(directory: "/nonexistent/a/b", limits: MetadataLimits()) { _ in }
    }
  }
}
