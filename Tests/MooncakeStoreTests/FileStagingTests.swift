import CLinux
import Glibc
import MooncakeEngine
import MooncakeStore
import Testing

@Suite struct FileStagingTests {
  private static func manifest(_ files: [FileList.File]) throws -> Manifest {
    let layout = try ShardLayout(
      bufferSizes: files.map(\.size).filter { $0 > 0 }, shardBytes: 1 << 20)
    return try Manifest(
      layout: layout,
      digests: Array(repeating: Digest(high: 0, low: 0), count: layout.shardCount),
      attributes: FileList(files).json)
  }

  private static let files: [FileList.File] = [
    .init(path: "a", size: 5), .init(path: "d/e/empty", size: 0),
    .init(path: "d/run", size: 5000, isExecutable: true),
  ]

  private func failure(_ body: () throws -> Void) -> EngineError? {
    #expect(throws: EngineError.self) { try body() }
  }

  private static func fill(_ buffers: [PayloadBuffer]) {
    for (index, buffer) in buffers.enumerated() {
      memset(buffer.address, Int32(index + 1), Int(buffer.length))
    }
  }

  @Test func filesGetTheirNamesAtTheEnd() throws {
    for syncs in [false, true] {
      let scratch = ScratchDirectory()
      let staging = FileStaging(
        directory: scratch["new/out/"], payload: "p", replacesFiles: false)
      let buffers = try staging.place(Self.manifest(Self.files))
      #expect(buffers.map(\.length) == [5, 5000])
      Self.fill(buffers)
      #expect(scratch.names(in: "new/out").count == 1)
      let files = try staging.commit(syncs: syncs)
      #expect(files.map(\.path) == Self.files.map { scratch["new/out/" + $0.path] })
      #expect(scratch.names(in: "new/out") == ["a", "d"])
      #expect(scratch.contents("new/out/a") == Array(repeating: 1, count: 5))
      #expect(scratch.contents("new/out/d/e/empty") == [])
      #expect(scratch.contents("new/out/d/run") == Array(repeating: 2, count: 5000))
      #expect(access(scratch["new/out/d/run"], X_OK) == 0)
      var status = stat()
      #expect(stat(scratch["new/out/a"], &status) == 0 && status.st_mode & 0o111 == 0)
      for file in files { try file.check() }
    }
  }

  @Test func nothingIsLeftWithoutCommit() throws {
    let scratch = ScratchDirectory()
    scratch.write("old", [1])
    do {
      let staging = FileStaging(
        directory: scratch["new/out"], payload: "p", replacesFiles: false)
      _ = try staging.place(Self.manifest(Self.files))
      #expect(scratch.names() == ["new", "old"])
    }
    #expect(scratch.names() == ["old"])
  }

  @Test func anotherVersionStartsOver() throws {
    let scratch = ScratchDirectory()
    let staging = FileStaging(directory: scratch["out"], payload: "p", replacesFiles: false)
    _ = try staging.place(Self.manifest(Self.files))
    Self.fill(try staging.place(Self.manifest([.init(path: "z", size: 3)])))
    _ = try staging.commit(syncs: false)
    #expect(scratch.names(in: "out") == ["z"])
    #expect(scratch.contents("out/z") == [1, 1, 1])
  }

  @Test func memoryBecomesOneFile() throws {
    let scratch = ScratchDirectory()
    let layout = try ShardLayout(bufferSizes: [3, 4], shardBytes: 16)
    let digests = Array(repeating: Digest(high: 0, low: 0), count: 2)
    let manifest = try Manifest(layout: layout, digests: digests)
    let staging = FileStaging(
      directory: scratch["out"], payload: "models/step-7", replacesFiles: false)
    let buffers = try staging.place(manifest)
    #expect(buffers.map(\.length) == [7])
    _ = try staging.commit(syncs: false)
    #expect(scratch.contents("out/step-7")?.count == 7)
    let nameless = FileStaging(directory: scratch["out"], payload: "..", replacesFiles: false)
    #expect(failure { _ = try nameless.place(manifest) }?.code == .invalidArgument)
  }

  @Test func filesInTheWay() throws {
    let manifest = try Self.manifest(Self.files)
    for (existing, isReplaceable) in [("a", true), ("a/x", false), ("d", false)] {
      let scratch = ScratchDirectory()
      scratch.write("out/" + existing, [9])
      for replaces in [false, true] {
        let staging = FileStaging(
          directory: scratch["out"], payload: "p", replacesFiles: replaces)
        if replaces && isReplaceable {
          Self.fill(try staging.place(manifest))
          _ = try staging.commit(syncs: false)
          #expect(scratch.contents("out/a") == Array(repeating: 1, count: 5))
        } else {
          #expect(failure { _ = try staging.place(manifest) }?.code == .exists, "\(existing)")
          #expect(scratch.contents("out/" + existing) == [9])
          #expect(scratch.names(in: "out").count == 1)
        }
      }
    }
  }

  @Test func whatCameMeanwhileStays() throws {
    let scratch = ScratchDirectory()
    let staging = FileStaging(directory: scratch["out"], payload: "p", replacesFiles: false)
    _ = try staging.place(Self.manifest(Self.files))
    scratch.write("out/a", [9])
    #expect(failure { _ = try staging.commit(syncs: false) }?.code == .exists)
    staging.discard()
    #expect(scratch.names(in: "out") == ["a"])
    #expect(scratch.contents("out/a") == [9])
  }

  @Test func leftoversOfTheDeadGo() throws {
    let scratch = ScratchDirectory()
    scratch.write("out/.mooncake-get-dead00/d/part", [1])
    symlink("/", scratch["out/.mooncake-get-dead00/link"])
    let living = FileStaging(directory: scratch["out"], payload: "p", replacesFiles: false)
    _ = try living.place(Self.manifest([.init(path: "living", size: 1)]))
    #expect(scratch.names(in: "out").count == 1)
    let other = FileStaging(directory: scratch["out"], payload: "p", replacesFiles: false)
    _ = try other.place(Self.manifest([.init(path: "other", size: 1)]))
    #expect(scratch.names(in: "out").count == 2)
    _ = try living.commit(syncs: false)
    _ = try other.commit(syncs: false)
    #expect(scratch.names(in: "out") == ["living", "other"])
  }

  @Test func aFullDiskSaysSoBefore() throws {
    let scratch = ScratchDirectory()
    mkdir(scratch["disk"], 0o700)
    guard mount("tmpfs", scratch["disk"], "tmpfs", 0, "size=1m") == 0 else {
      print("skipped aFullDiskSaysSoBefore: mounting a small tmpfs takes root")
      return
    }
    defer { umount(scratch["disk"]) }
    let staging = FileStaging(directory: scratch["disk/out"], payload: "p", replacesFiles: false)
    let manifest = try Self.manifest([
      .init(path: "small", size: 1000), .init(path: "large", size: 2 << 20),
    ])
    let error = failure { _ = try staging.place(manifest) }
    #expect(error?.code == .full)
    #expect(error?.message.contains("disk/out/large: making room for 2097152 bytes") == true)
    #expect(error?.message.contains("No space left") == true)
    #expect(scratch.names(in: "disk").isEmpty)
  }

  @Test func noPermission() throws {
    guard geteuid() != 0 else {
      print("skipped noPermission: root may write everywhere")
      return
    }
    let scratch = ScratchDirectory()
    mkdir(scratch["out"], 0o500)
    let staging = FileStaging(directory: scratch["out"], payload: "p", replacesFiles: false)
    let manifest = try Self.manifest([.init(path: "a", size: 1)])
    #expect(failure { _ = try staging.place(manifest) }?.code == .accessDenied)
  }
}
