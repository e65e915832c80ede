import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Testing

/// Either all files get into their places or none.
@Suite struct FileSwitchTests {
  private static let files: [FileList.File] = [
    .init(path: "a", size: 1), .init(path: "new/deep/b", size: 1), .init(path: "there/c", size: 1),
    .init(path: "there/d", size: 1), .init(path: "z", size: 1),
  ]

  private func failure(_ body: () throws -> Void) -> MooncakeError? {
    #expect(throws: MooncakeError.self) { try body() }
  }

  /// Complete files, filled with a byte, to be moved into "out".
  private func staged(
    _ scratch: ScratchDirectory, _ files: [FileList.File] = files, byte: UInt8 = 2,
    exchanges: Bool = true, replaces: Bool = true
  ) throws -> FileStaging {
    let staging = MooncakeP2PTests.staging(
      scratch["out"], replacesFiles: replaces, exchanges: exchanges)
    for buffer in try staging.place(Manifest.ofFiles(files)).buffers {
      memset(buffer.address, Int32(byte), Int(buffer.length))
    }
    return staging
  }

  private func contents(_ scratch: ScratchDirectory) -> [UInt8?] {
    Self.files.map { scratch.contents("out/" + $0.path)?.first }
  }

  @Test(arguments: [true, false])
  func aDirectoryThatCannotBeWrittenAnyMoreChangesNothing(exchanges: Bool) throws {
    let scratch = ScratchDirectory()
    let found: (message: String?, bytes: [UInt8?], names: [String])
    found = try asOrdinaryUser(scratch) {
      for name in ["a", "there/c"] { scratch.write("out/" + name, [1]) }
      let staging = try staged(scratch, exchanges: exchanges)
      chmod(scratch["out/there"], 0o500)
      var message: String?
      do { _ = try staging.commit(syncs: false) } catch { message = "\(error)" }
      chmod(scratch["out/there"], 0o700)
      let bytes = contents(scratch)
      staging.discard()
      return (message, bytes, scratch.names(in: "out"))
    }
    #expect(found.message?.contains("out/there/c") == true, "\(String(describing: found.message))")
    #expect(found.bytes == [1, nil, 1, nil, nil] && found.names == ["a", "there"])
  }

  @Test func aFailureHalfWayChangesNothing() throws {
    for exchanges in [true, false] {
      let scratch = ScratchDirectory()
      for name in ["a", "there/c"] { scratch.write("out/" + name, [1]) }
      let staging = try staged(scratch, exchanges: exchanges)
      // One place that the file system refuses: a mount covers it.
      scratch.write("out/z", [1])
      guard mount(scratch["out/a"], scratch["out/z"], "", UInt(MS_BIND), nil) == 0 else {
        print("skipped aFailureHalfWayChangesNothing: mounting takes root")
        return
      }
      let error = failure { _ = try staging.commit(syncs: false) }
      #expect(error?.message.contains("out/z") == true, "\(String(describing: error))")
      umount(scratch["out/z"])
      #expect(contents(scratch) == [1, nil, 1, nil, 1])
      staging.discard()
      #expect(scratch.names(in: "out") == ["a", "there", "z"])
      #expect(scratch.names(in: "out/there") == ["c"])
      // Without that, all of them get there.
      _ = try staged(scratch, exchanges: exchanges).commit(syncs: true)
      #expect(contents(scratch) == [2, 2, 2, 2, 2])
      #expect(scratch.names(in: "out") == ["a", "new", "there", "z"])
    }
  }

  @Test func anotherFileSystemIsRefusedFirst() throws {
    let scratch = ScratchDirectory()
    scratch.write("out/there/c", [1])
    guard mount("tmpfs", scratch["out/there"], "tmpfs", 0, "size=1m") == 0 else {
      print("skipped anotherFileSystemIsRefusedFirst: mounting takes root")
      return
    }
    defer { umount(scratch["out/there"]) }
    let error = failure { _ = try self.staged(scratch) }
    #expect(error?.message.contains("out/there is on another file system") == true)
    #expect(scratch.names(in: "out") == ["there"])
  }

  /// A process is killed after some files are in their places, and the next get finds that.
  @Test func whatAKilledGetHasBegunIsUndone() throws {
    for exchanges in [true, false] {
      for count in 0...Self.files.count {
        let scratch = ScratchDirectory()
        for name in ["a", "there/c"] { scratch.write("out/" + name, [1]) }
        try killed(scratch, after: count, exchanges: exchanges)
        let next = try staged(scratch, [.init(path: "other", size: 1)])
        #expect(contents(scratch) == [1, nil, 1, nil, nil], "\(count) \(exchanges)")
        _ = try next.commit(syncs: false)
        #expect(scratch.names(in: "out") == ["a", "other", "there"], "\(count) \(exchanges)")
        #expect(scratch.names(in: "out/there") == ["c"])
      }
    }
  }

  /// A name may begin with a mark that combines with the character before it, a slash or a space.
  @Test func namesThatBeginWithACombiningMark() throws {
    let files: [FileList.File] = [
      .init(path: "\u{301}a", size: 1), .init(path: "d/\u{301}x", size: 1),
      .init(path: "d/\u{301}y/\u{301}z", size: 1),
    ]
    for count in 0...files.count {
      let scratch = ScratchDirectory()
      for name in ["\u{301}a", "d/\u{301}y/\u{301}z"] { scratch.write("out/" + name, [1]) }
      try killed(scratch, files, replaced: [0, 2], depths: [0, 1, 2], after: count)
      let next = try staged(scratch, [.init(path: "other", size: 1)])
      let found = files.map { scratch.contents("out/" + $0.path)?.first }
      #expect(found == [1, nil, 1], "\(count)")
      #expect(scratch.names(in: "out/d") == ["\u{301}y"])
      next.discard()
      #expect(scratch.names(in: "out").count == 2)
    }
  }

  /// Makes what such a process leaves behind.
  private func killed(
    _ scratch: ScratchDirectory, after count: Int, exchanges: Bool
  ) throws {
    try killed(
      scratch, Self.files, replaced: [0, 2], depths: [0, 0, 1, 1, 0], after: count,
      exchanges: exchanges)
  }

  private func killed(
    _ scratch: ScratchDirectory, _ files: [FileList.File], replaced: Set<Int>, depths: [Int],
    after count: Int, exchanges: Bool = true
  ) throws {
    let area = "out/.mooncake-get-00000000000dead0"
    func status(_ name: String) throws -> stat {
      var status = stat()
      try #require(lstat(scratch[name], &status) == 0)
      return status
    }
    var journal = "mooncake-switch 1\n"
    for (index, file) in files.enumerated() {
      scratch.write(area + "/new/" + file.path, [2])
      let new = try status(area + "/new/" + file.path)
      let old = replaced.contains(index) ? try status("out/" + file.path).st_ino : 0
      journal += "\(depths[index]) \(new.st_ino) \(new.st_mtim.tv_sec) "
      journal += "\(new.st_mtim.tv_nsec) \(old) " + file.path + "\n"
    }
    mkdir(scratch[area + "/old"], 0o700)
    scratch.write(area + "/switch", Array((journal + "end\n").utf8))
    scratch.leaveLock(in: area)
    for (index, file) in files.prefix(count).enumerated() {
      let (from, to) = (scratch[area + "/new/" + file.path], scratch["out/" + file.path])
      if file.path.hasPrefix("new") {
        mkdir(scratch["out/new"], 0o755)
        mkdir(scratch["out/new/deep"], 0o755)
      }
      if access(to, F_OK) != 0 {
        try #require(rename(from, to) == 0)
      } else if exchanges {
        try #require(
          linux_rename(AT_FDCWD, from, AT_FDCWD, to, UInt32(LINUX_RENAME_EXCHANGE)) == 0)
      } else {
        try #require(rename(to, scratch[area + "/old/\(index)"]) == 0)
        // It was killed between the two steps of the last one.
        if index < count - 1 { try #require(rename(from, to) == 0) }
      }
    }
  }

  @Test func whatCannotBePutBackIsKept() throws {
    let scratch = ScratchDirectory()
    for name in ["a", "there/c"] { scratch.write("out/" + name, [1]) }
    try killed(scratch, after: 5, exchanges: true)
    // Meanwhile one file was replaced, and one changed.
    unlink(scratch["out/a"])
    scratch.write("out/a", [9])
    usleep(20_000)
    scratch.write("out/z", [9])
    let next = try staged(scratch, [.init(path: "other", size: 1)])
    _ = try next.commit(syncs: false)
    #expect(contents(scratch) == [9, nil, 1, nil, 9])
    #expect(scratch.contents("out/.mooncake-get-00000000000dead0/new/a") == [1])
  }

  @Test func aGetThatIsKilledBeforeItBeginsLeavesNothing() throws {
    let scratch = ScratchDirectory()
    let area = "out/.mooncake-get-0000000000000dd1"
    scratch.write("\(area)/switch.part", Array("mooncake-swi".utf8))
    scratch.write("\(area)/new/a", [2])
    scratch.leaveLock(in: area)
    _ = try staged(scratch).commit(syncs: false)
    #expect(scratch.names(in: "out") == ["a", "new", "there", "z"])
  }

  @Test func aMalformedJournalTouchesNothing() throws {
    for text in ["", "mooncake-switch 1\n", "mooncake-switch 1\n0 1 2 3 4 ../../x\nend\n"] {
      let scratch = ScratchDirectory()
      scratch.write("out/.mooncake-get-0000000000000dd0/switch", Array(text.utf8))
      scratch.write("out/.mooncake-get-0000000000000dd0/new/old", [1])
      scratch.leaveLock(in: "out/.mooncake-get-0000000000000dd0")
      _ = try staged(scratch).commit(syncs: false)
      #expect(contents(scratch) == [2, 2, 2, 2, 2])
      #expect(scratch.contents("out/.mooncake-get-0000000000000dd0/new/old") == [1])
    }
  }

  // MARK: Several at once

  /// Runs `body` on several threads and returns what they threw.
  private func together(
    _ count: Int, _ body: @escaping @Sendable (Int) throws -> Void
  ) throws -> [String] {
    let failures = Lock<[String]>([])
    let threads = try (0..<count).map { index in
      try WorkerThread.start(name: "get") {
        do { try body(index) } catch { failures.withLock { $0.append("\(error)") } }
      }
    }
    for thread in threads { thread.join() }
    return failures.withLock { $0 }
  }

  @Test func manyIntoOneNewDirectory() throws {
    for _ in 0..<20 {
      let scratch = ScratchDirectory()
      let failures = try together(8) { index in
        let files: [FileList.File] = [
          .init(path: "f\(index)", size: 1), .init(path: "sub/deep/g\(index)", size: 1),
        ]
        let staging = try staged(scratch, files, byte: UInt8(index + 1), replaces: false)
        // Some fail and undo what they have made.
        if index % 4 == 3 { return staging.discard() }
        _ = try staging.commit(syncs: false)
      }
      #expect(failures == [])
      let names = [0, 1, 2, 4, 5, 6].map { "f\($0)" }
      #expect(scratch.names(in: "out") == names + ["sub"])
      #expect(scratch.names(in: "out/sub/deep").count == 6)
      for index in [0, 1, 2, 4, 5, 6] {
        #expect(scratch.contents("out/sub/deep/g\(index)") == [UInt8(index + 1)])
      }
    }
  }

  @Test func theLastCompleteOneStands() throws {
    for exchanges in [true, false] {
      let scratch = ScratchDirectory()
      let failures = try together(4) { index in
        for _ in 0..<10 {
          _ = try staged(scratch, byte: UInt8(index + 1), exchanges: exchanges)
            .commit(syncs: false)
        }
      }
      #expect(failures == [])
      let bytes = contents(scratch)
      #expect(bytes.allSatisfy { $0 != nil && $0 == bytes[0] }, "\(bytes)")
      #expect(scratch.names(in: "out") == ["a", "new", "there", "z"])
    }
  }
}
