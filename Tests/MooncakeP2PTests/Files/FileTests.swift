import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Testing

@Suite struct FileTests {
  private func failure(_ body: () throws -> Void) -> MooncakeError? {
    #expect(throws: MooncakeError.self) { try body() }
  }

  private static func find(_ paths: [String]) throws -> [FileTree.Found] {
    try FileTree.files(of: paths.map { FilePath($0) })
  }

  private func path(_ text: String) -> FilePath { FilePath(text) }

  // MARK: Finding them

  @Test func aDirectoryIsItsContents() throws {
    let scratch = ScratchDirectory()
    for name in ["m/b", "m/a", "m/sub/c", "m/.hidden", "m/.mooncake-get-abcdef/part"] {
      scratch.write(name, [1])
    }
    let found = try Self.find([scratch["m"]])
    #expect(found.map(\.name) == [".hidden", "a", "b", "sub/c"])
    #expect(found.last?.path.description == scratch["m/sub/c"])
  }

  @Test func severalPathsKeepTheirNames() throws {
    let scratch = ScratchDirectory()
    for name in ["m/b", "n/c", "x"] { scratch.write(name, [1]) }
    let found = try Self.find([scratch["x"], scratch["m/"], scratch["n/."]])
    #expect(found.map(\.name) == ["m/b", "n/c", "x"])
    #expect(try Self.find([scratch["x"]]).map(\.name) == ["x"])
  }

  @Test func linksToFilesAreFollowed() throws {
    let scratch = ScratchDirectory()
    scratch.write("blobs/1234", [1, 2, 3])
    scratch.write("m/other", [1])
    symlink("../blobs/1234", scratch["m/model"])
    let found = try Self.find([scratch["m"]])
    #expect(found.map(\.name) == ["model", "other"])
    #expect(try MappedFile(reading: found[0].path).size == 3)
  }

  @Test func whatCannotBePublished() throws {
    let scratch = ScratchDirectory()
    scratch.write("m/file", [1])
    func message(_ paths: [String]) -> String {
      failure { _ = try Self.find(paths) }?.message ?? ""
    }
    #expect(message([]).contains("no file"))
    #expect(message([scratch["nowhere"]]).contains("No such file"))
    symlink("missing", scratch["m/dangling"])
    #expect(message([scratch["m"]]).contains("m/dangling is a link that leads nowhere"))
    unlink(scratch["m/dangling"])
    symlink("..", scratch["m/up"])
    #expect(message([scratch["m"]]).contains("m/up is a link to a directory"))
    unlink(scratch["m/up"])
    mkfifo(scratch["m/pipe"], 0o600)
    #expect(message([scratch["m"]]).contains("m/pipe is neither"))
    unlink(scratch["m/pipe"])
    mkdir(scratch["void"], 0o700)
    #expect(message([scratch["void"]]).contains("no files in"))
  }

  // MARK: Reading them

  @Test func digestsAreThoseOfTheBytes() throws {
    let scratch = ScratchDirectory()
    let bytes = (0..<700_000).map { UInt8(truncatingIfNeeded: $0 &* 7) }
    let file = try MappedFile(reading: path(scratch.write("f", bytes, mode: 0o755)))
    #expect(file.isExecutable && file.size == 700_000)
    for (offset, length) in [(0, 700_000), (1, 5), (262_144, 262_144), (699_999, 1)] {
      let expected = bytes[offset..<offset + length].withUnsafeBytes { Digest(of: $0) }
      #expect(try file.digest(offset: UInt64(offset), length: UInt64(length)) == expected)
    }
    let buffer = try #require(file.buffer)
    #expect(buffer.length == 700_000)
    #expect(memcmp(buffer.address, bytes, bytes.count) == 0)
  }

  @Test func anEmptyFileHasNoBuffer() throws {
    let scratch = ScratchDirectory()
    let file = try MappedFile(reading: path(scratch.write("f", [])))
    #expect(file.buffer == nil && file.size == 0)
    try file.check()
  }

  @Test func aChangedFileIsNamed() throws {
    let changes: [(String, (ScratchDirectory) -> Void)] = [
      ("written", { $0.write("f", Array(repeating: 2, count: 5000)) }),
      ("cut", { truncate($0["f"], 10) }),
      ("grown", { truncate($0["f"], 10_000) }),
      ("replaced", { rename($0.write("g", Array(repeating: 1, count: 5000)), $0["f"]) }),
    ]
    for (name, change) in changes {
      let scratch = ScratchDirectory()
      let file = try MappedFile(reading: path(scratch.write("f", Array(repeating: 1, count: 5000))))
      // File timestamps advance in steps of some milliseconds.
      usleep(20_000)
      change(scratch)
      for error in [
        failure { try file.check() }, failure { _ = try file.digest(offset: 0, length: 5000) },
      ] {
        #expect(error?.code == .digestMismatch, "\(name)")
        #expect(error?.message.contains("/f has changed") == true)
      }
    }
    let scratch = ScratchDirectory()
    let file = try MappedFile(reading: path(scratch.write("f", [1])))
    unlink(scratch["f"])
    #expect(failure { try file.check() }?.message.contains("changed") == true)
  }
}
