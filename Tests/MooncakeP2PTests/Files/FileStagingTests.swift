import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Testing

@Suite struct FileStagingTests {
  private static let files: [FileList.File] = [
    .init(path: "a", size: 5), .init(path: "d/e/empty", size: 0),
    .init(path: "d/run", size: 5000, isExecutable: true),
  ]

  private func failure(_ body: () throws -> Void) -> MooncakeError? {
    #expect(throws: MooncakeError.self) { try body() }
  }

  private static func fill(_ buffers: [PayloadBuffer]) {
    for (index, buffer) in buffers.enumerated() {
      memset(buffer.address, Int32(index + 1), Int(buffer.length))
    }
  }

  /// The signal for exceeding the limit must not kill the host.
  @Test func aSizeLimitIsAnError() throws {
    var former = rlimit()
    getrlimit(__rlimit_resource_t(RLIMIT_FSIZE.rawValue), &former)
    // Other tests write smaller files meanwhile.
    var limit = former
    limit.rlim_cur = 1 << 40
    setrlimit(__rlimit_resource_t(RLIMIT_FSIZE.rawValue), &limit)
    defer { setrlimit(__rlimit_resource_t(RLIMIT_FSIZE.rawValue), &former) }
    let scratch = ScratchDirectory()
    let staging = MooncakeP2PTests.staging(scratch["out"])
    let layout = try ShardLayout(bufferSizes: [1 << 41], shardBytes: 1 << 32)
    let manifest = try Manifest(
      layout: layout,
      digests: Array(repeating: Digest(high: 0, low: 0), count: layout.shardCount),
      attributes: FileList([.init(path: "a", size: 1 << 41)]).json)
    let error = failure { _ = try staging.place(manifest) }
    #expect(error?.message.contains("making room") == true, "\(String(describing: error))")
    staging.discard()
  }

  @Test func filesGetTheirNamesAtTheEnd() throws {
    for syncs in [false, true] {
      let scratch = ScratchDirectory()
      let staging = MooncakeP2PTests.staging(scratch["new/out/"])
      let buffers = try staging.place(Manifest.ofFiles(Self.files)).buffers
      #expect(buffers.map(\.length) == [5, 5000])
      Self.fill(buffers)
      #expect(scratch.names(in: "new/out").count == 1)
      let files = try staging.commit(syncs: syncs)
      #expect(files.map(\.path.description) == Self.files.map { scratch["new/out/" + $0.path] })
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

  /// A slash and a combining mark after it are one character, but two bytes.
  @Test func namesThatBeginWithACombiningMark() throws {
    let scratch = ScratchDirectory()
    let files: [FileList.File] = [
      .init(path: "d/\u{301}x", size: 1), .init(path: "d/\u{301}y/\u{301}z", size: 1),
      .init(path: "d/\u{302}y/\u{301}z", size: 1),
    ]
    let staging = MooncakeP2PTests.staging(scratch["out"])
    Self.fill(try staging.place(Manifest.ofFiles(files)).buffers)
    _ = try staging.commit(syncs: true)
    #expect(scratch.names(in: "out") == ["d"])
    #expect(scratch.names(in: "out/d").count == 3)
    #expect(files.map { scratch.contents("out/" + $0.path) } == [[1], [2], [3]])
    let layout = try ShardLayout(bufferSizes: [3], shardBytes: 16)
    let memory = try Manifest(layout: layout, digests: [Digest(high: 0, low: 0)])
    let nameless = MooncakeP2PTests.staging(scratch["out"], payload: "models/\u{301}step")
    _ = try nameless.place(memory)
    _ = try nameless.commit(syncs: false)
    #expect(scratch.contents("out/\u{301}step")?.count == 3)
  }

  /// New directories inherit the set-group-ID bit of their parent.
  @Test func aDirectoryThatHandsItsGroupDown() throws {
    let scratch = ScratchDirectory()
    mkdir(scratch["out"], 0o755)
    chmod(scratch["out"], 0o2755)
    scratch.write("out/.mooncake-get-00000000000dead0/new/part", [1])
    scratch.leaveLock(in: "out/.mooncake-get-00000000000dead0")
    chmod(scratch["out/.mooncake-get-00000000000dead0"], 0o2700)
    let staging = MooncakeP2PTests.staging(scratch["out"])
    Self.fill(try staging.place(Manifest.ofFiles([.init(path: "a", size: 1)])).buffers)
    _ = try staging.commit(syncs: false)
    #expect(scratch.names(in: "out") == ["a"])
  }

  /// The holes before files that begin at a huge page are mappings too.
  @Test func mappingsOfFilesAndHoles() throws {
    let huge = 2 << 20
    let sizes = [UInt64](repeating: UInt64(huge) + 1, count: 100) + [0, 1]
    let aligned = try #require(FilePlaces(sizes: sizes, mappingLimit: 200))
    #expect(aligned.mappingCount == 200)
    #expect(aligned.offsets.prefix(100).allSatisfy { $0 % huge == 0 })
    // No holes if they would be too many mappings.
    let dense = try #require(FilePlaces(sizes: sizes, mappingLimit: 199))
    #expect(dense.mappingCount == 101)
    for (index, size) in sizes.enumerated().dropLast() {
      let gap = dense.offsets[index + 1] - dense.offsets[index] - Int(size)
      #expect((0..<65_536).contains(gap))
    }
    #expect(FilePlaces(sizes: [.max], mappingLimit: .max) == nil)
  }

  @Test func nothingIsLeftWithoutCommit() throws {
    let scratch = ScratchDirectory()
    scratch.write("old", [1])
    do {
      let staging = MooncakeP2PTests.staging(scratch["new/out"])
      _ = try staging.place(Manifest.ofFiles(Self.files))
      #expect(scratch.names() == ["new", "old"])
    }
    #expect(scratch.names() == ["old"])
  }

  @Test func anotherVersionStartsOver() throws {
    let scratch = ScratchDirectory()
    let staging = MooncakeP2PTests.staging(scratch["out"])
    _ = try staging.place(Manifest.ofFiles(Self.files))
    Self.fill(try staging.place(Manifest.ofFiles([.init(path: "z", size: 3)])).buffers)
    _ = try staging.commit(syncs: false)
    #expect(scratch.names(in: "out") == ["z"])
    #expect(scratch.contents("out/z") == [1, 1, 1])
  }

  @Test func memoryBecomesOneFile() throws {
    let scratch = ScratchDirectory()
    let layout = try ShardLayout(bufferSizes: [3, 4], shardBytes: 16)
    let digests = Array(repeating: Digest(high: 0, low: 0), count: 2)
    let manifest = try Manifest(layout: layout, digests: digests)
    let staging = MooncakeP2PTests.staging(scratch["out"], payload: "models/step-7")
    let buffers = try staging.place(manifest).buffers
    #expect(buffers.map(\.length) == [7])
    _ = try staging.commit(syncs: false)
    #expect(scratch.contents("out/step-7")?.count == 7)
    let nameless = MooncakeP2PTests.staging(scratch["out"], payload: "..")
    #expect(failure { _ = try nameless.place(manifest) }?.code == .invalidArgument)
  }

  @Test func filesInTheWay() throws {
    let manifest = try Manifest.ofFiles(Self.files)
    for (existing, isReplaceable) in [("a", true), ("a/x", false), ("d", false)] {
      let scratch = ScratchDirectory()
      scratch.write("out/" + existing, [9])
      for replaces in [false, true] {
        let staging = MooncakeP2PTests.staging(scratch["out"], replacesFiles: replaces)
        if replaces && isReplaceable {
          Self.fill(try staging.place(manifest).buffers)
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
    let staging = MooncakeP2PTests.staging(scratch["out"])
    _ = try staging.place(Manifest.ofFiles(Self.files))
    scratch.write("out/a", [9])
    #expect(failure { _ = try staging.commit(syncs: false) }?.code == .exists)
    staging.discard()
    #expect(scratch.names(in: "out") == ["a"])
    #expect(scratch.contents("out/a") == [9])
  }

  @Test func leftoversOfTheDeadGo() throws {
    let scratch = ScratchDirectory()
    scratch.write("out/.mooncake-get-00000000000dead0/new/d/part", [1])
    scratch.leaveLock(in: "out/.mooncake-get-00000000000dead0")
    symlink("/", scratch["out/.mooncake-get-00000000000dead0/link"])
    mkdir(scratch["out/.mooncake-get-00000000000dead1"], 0o700)
    let living = MooncakeP2PTests.staging(scratch["out"])
    _ = try living.place(Manifest.ofFiles([.init(path: "living", size: 1)]))
    #expect(scratch.names(in: "out").count == 1)
    let other = MooncakeP2PTests.staging(scratch["out"])
    _ = try other.place(Manifest.ofFiles([.init(path: "other", size: 1)]))
    #expect(scratch.names(in: "out").count == 2)
    _ = try living.commit(syncs: false)
    _ = try other.commit(syncs: false)
    #expect(scratch.names(in: "out") == ["living", "other"])
  }

  /// After a reboot, devices may have other numbers, and an interrupted switch must still be
  /// undone.
  @Test func leftoversFromBeforeTheMachineWasStarted() throws {
    let scratch = ScratchDirectory()
    let name = ".mooncake-get-00000000000dead"
    for (index, changed) in [[2, 3], [2], [1, 3], [0, 3]].enumerated() {
      let area = "out/\(name)\(index)"
      scratch.write(area + "/file", [1])
      scratch.leaveLock(in: area)
      var lines = String(decoding: scratch.contents(area + "/lock")!, as: UTF8.self)
        .split(separator: "\n").map { String($0) }
      for line in changed { lines[line] += "1" }
      scratch.write(area + "/lock", Array((lines.joined(separator: "\n") + "\n").utf8))
    }
    let staging = MooncakeP2PTests.staging(scratch["out"])
    Self.fill(try staging.place(Manifest.ofFiles([.init(path: "a", size: 1)])).buffers)
    _ = try staging.commit(syncs: false)
    #expect(scratch.names(in: "out") == [1, 2, 3].map { "\(name)\($0)" } + ["a"])
  }

  @Test func whatOnlyLooksLikeALeftoverStays() throws {
    let scratch = ScratchDirectory()
    // What another user with write access might prepare.
    scratch.write("victim/file", [1])
    scratch.leaveLock(in: "victim")
    mkdir(scratch["out"], 0o777)
    let name = "out/.mooncake-get-00000000000000"
    symlink(scratch["victim"], scratch[name + "a0"])
    scratch.write(name + "b0", [2])
    scratch.write(name + "c0/file", [3])
    scratch.write(name + "c1/file", [4])
    scratch.leaveLock(in: name + "c1")
    chmod(scratch[name + "c1"], 0o777)
    scratch.write(name + "c2/file", [5])
    symlink(scratch["victim/lock"], scratch[name + "c2/lock"])
    mkfifo(scratch[name + "b1"], 0o600)
    scratch.write(name + "c3/file", [6])
    mkfifo(scratch[name + "c3/lock"], 0o600)
    // The caller's own directories that were given such names.
    for (index, text) in ["", "1234\n", "mooncake-get 1\n7\n8\n"].enumerated() {
      scratch.write("state/file", [8])
      scratch.write("state/lock", Array(text.utf8), mode: 0o600)
      chmod(scratch["state"], 0o700)
      rename(scratch["state"], scratch[name + "d\(index)"])
    }
    // A copied lock; one that others may read; a name that no get chooses.
    scratch.write(name + "e0/file", [9])
    scratch.write(name + "e0/lock", scratch.contents("victim/lock")!, mode: 0o600)
    chmod(scratch[name + "e0"], 0o700)
    for name in [name + "e1", "out/.mooncake-get-x", name + "0e2", name + "E3"] {
      scratch.write(name + "/file", [9])
      scratch.leaveLock(in: name)
    }
    chmod(scratch[name + "e1"], 0o755)
    if geteuid() == 0 {
      scratch.write(name + "f0/file", [7])
      scratch.leaveLock(in: name + "f0")
      chown(scratch[name + "f0"], 12345, 12345)
    }
    let before = scratch.names(in: "out")
    let staging = MooncakeP2PTests.staging(scratch["out"])
    Self.fill(try staging.place(Manifest.ofFiles([.init(path: "a", size: 1)])).buffers)
    _ = try staging.commit(syncs: false)
    #expect(scratch.names(in: "out") == (before + ["a"]).sorted())
    #expect(scratch.names(in: "victim") == ["file", "lock"])
    for name in before where !["a0", "b0", "b1"].contains(where: { name.hasSuffix($0) }) {
      #expect(scratch.names(in: "out/" + name).contains("file"), "\(name)")
    }
  }

  @Test func linksInTheDirectoryAreNotFollowed() throws {
    let scratch = ScratchDirectory()
    scratch.write("victim/file", [1])
    mkdir(scratch["out"], 0o755)
    symlink("../victim", scratch["out/d"])
    let manifest = try Manifest.ofFiles([.init(path: "d/file", size: 1)])
    let staging = MooncakeP2PTests.staging(scratch["out"], replacesFiles: true)
    let error = failure { _ = try staging.place(manifest) }
    #expect(error?.code == .exists && error?.message.contains("out/d is a link") == true)
    // Even if it appears while bytes arrive.
    unlink(scratch["out/d"])
    Self.fill(try staging.place(manifest).buffers)
    symlink("../victim", scratch["out/d"])
    #expect(failure { _ = try staging.commit(syncs: false) }?.message.contains("link") == true)
    staging.discard()
    #expect(scratch.names(in: "out") == ["d"] && scratch.contents("victim/file") == [1])
    // A link in the place of a file is replaced, not followed; the target directory may be a link.
    unlink(scratch["out/d"])
    symlink("../victim/file", scratch["out/a"])
    symlink("out", scratch["alias"])
    let through = MooncakeP2PTests.staging(scratch["alias"], replacesFiles: true)
    Self.fill(try through.place(Manifest.ofFiles([.init(path: "a", size: 1)])).buffers)
    _ = try through.commit(syncs: false)
    var status = stat()
    #expect(lstat(scratch["out/a"], &status) == 0 && status.st_mode & S_IFMT == S_IFREG)
    #expect(scratch.contents("victim/file") == [1])
  }

  @Test func whatIsReplacedKeepsItsOtherNames() throws {
    let scratch = ScratchDirectory()
    scratch.write("out/a", [1])
    link(scratch["out/a"], scratch["elsewhere"])
    mkfifo(scratch["out/b"], 0o600)
    let staging = MooncakeP2PTests.staging(scratch["out"], replacesFiles: true)
    let files: [FileList.File] = [.init(path: "a", size: 1), .init(path: "b", size: 1)]
    Self.fill(try staging.place(Manifest.ofFiles(files)).buffers)
    _ = try staging.commit(syncs: false)
    #expect(scratch.contents("elsewhere") == [1])
    #expect(scratch.contents("out/b") == [2])
  }

  @Test func aFullDiskSaysSoBefore() throws {
    let scratch = ScratchDirectory()
    mkdir(scratch["disk"], 0o700)
    guard mount("tmpfs", scratch["disk"], "tmpfs", 0, "size=1m") == 0 else {
      print("skipped aFullDiskSaysSoBefore: mounting a small tmpfs takes root")
      return
    }
    defer { umount(scratch["disk"]) }
    let staging = MooncakeP2PTests.staging(scratch["disk/out"])
    let manifest = try Manifest.ofFiles([
      .init(path: "small", size: 1000), .init(path: "large", size: 2 << 20),
    ])
    let error = failure { _ = try staging.place(manifest) }
    #expect(error?.code == .full)
    #expect(error?.message.contains("disk/out/large: making room for 2097152 bytes") == true)
    #expect(error?.message.contains("No space left") == true)
    #expect(scratch.names(in: "disk").isEmpty)
  }

  @Test func noPermission() throws {
    let scratch = ScratchDirectory()
    let manifest = try Manifest.ofFiles([.init(path: "a", size: 1)])
    let error: MooncakeError? = try asOrdinaryUser(scratch) {
      mkdir(scratch["out"], 0o500)
      let staging = MooncakeP2PTests.staging(scratch["out"])
      do { _ = try staging.place(manifest) } catch { return error as? MooncakeError }
      return nil
    }
    #expect(error?.code == .accessDenied)
  }

  /// What is synced to disk, and in which order.
  @Test func syncsFilesThenPlaces() throws {
    let scratch = ScratchDirectory()
    let synced = Lock<[String]>([])
    let sync = DiskSync { number in
      var path = [CChar](repeating: 0, count: 4096)
      let count = readlink("/proc/self/fd/\(number)", &path, path.count)
      let bytes = path[..<max(0, count)].map { UInt8(bitPattern: $0) }
      synced.withLock { $0.append(String(decoding: bytes, as: UTF8.self)) }
      return fsync(number)
    }
    let staging = MooncakeP2PTests.staging(scratch["made/out"], sync: sync)
    let files: [FileList.File] = [.init(path: "a", size: 1), .init(path: "d/e/b", size: 1)]
    Self.fill(try staging.place(Manifest.ofFiles(files)).buffers)
    _ = try staging.commit(syncs: true)
    let paths = synced.withLock { $0 }
    let hidden = "/.mooncake-get-"
    let contents = try ["a", "d/e/b"].map { name in
      try #require(paths.firstIndex { $0.contains(hidden) && $0.hasSuffix("/" + name) })
    }
    let journal = try #require(paths.firstIndex { $0.hasSuffix("/switch.part") })
    let places = try ["made/out", "made/out/d", "made/out/d/e", "made", ""].map { name in
      let path = name.isEmpty ? scratch.path : scratch[name]
      return try #require(paths.firstIndex(of: path), "\(path) in \(paths)")
    }
    #expect(contents.max()! < journal && journal < places.min()!)
    // Without `syncs`, nothing.
    synced.withLock { $0 = [] }
    let quick = MooncakeP2PTests.staging(scratch["quick"], sync: sync)
    Self.fill(try quick.place(Manifest.ofFiles(files)).buffers)
    _ = try quick.commit(syncs: false)
    #expect(synced.withLock { $0 }.isEmpty)
  }

  @Test(arguments: ["contents", "places", "parents"])
  func aFailureToSyncChangesNothing(_ step: String) throws {
    let scratch = ScratchDirectory()
    scratch.write("there/out/a", [1])
    let out = scratch["there/out/new"]
    let parent = scratch["there/out"]
    let sync = DiskSync { number in
      var path = [CChar](repeating: 0, count: 4096)
      let count = readlink("/proc/self/fd/\(number)", &path, path.count)
      let bytes = path[..<max(0, count)].map { UInt8(bitPattern: $0) }
      let text = String(decoding: bytes, as: UTF8.self)
      let isStep =
        switch step {
        case "contents": text.hasSuffix("/a")
        case "places": text == out
        default: text == parent
        }
      if !isStep { return fsync(number) }
      errno = EIO
      return -1
    }
    let staging = MooncakeP2PTests.staging(out, sync: sync)
    Self.fill(try staging.place(Manifest.ofFiles([.init(path: "a", size: 1)])).buffers)
    #expect(failure { _ = try staging.commit(syncs: true) }?.message.contains("disk") == true)
    staging.discard()
    #expect(scratch.names(in: "there/out") == ["a"])
  }

  /// A user may be able to make entries in a directory but not read it, so it cannot be synced.
  @Test func aParentThatCannotBeReadFailsTheSync() throws {
    let scratch = ScratchDirectory()
    let manifest = try Manifest.ofFiles([.init(path: "a", size: 1)])
    let (error, names): (MooncakeError?, [String]) = try asOrdinaryUser(scratch) {
      mkdir(scratch["p"], 0o300)
      let staging = MooncakeP2PTests.staging(scratch["p/out"])
      Self.fill(try staging.place(manifest).buffers)
      var failure: MooncakeError?
      do { _ = try staging.commit(syncs: true) } catch { failure = error as? MooncakeError }
      staging.discard()
      chmod(scratch["p"], 0o700)
      return (failure, scratch.names(in: "p"))
    }
    #expect(error?.code == .accessDenied && names.isEmpty, "\(String(describing: error)) \(names)")
  }
}
