import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import MooncakeTestSupport
import Testing

@Suite struct PayloadFilesTests {
  private var shards: RegisterOptions {
    var options = RegisterOptions()
    options.shardBytes = 64 << 10
    return options
  }

  private static func bytes(_ count: Int, seed: Int) -> [UInt8] {
    (0..<count).map { UInt8(truncatingIfNeeded: ($0 &+ seed) &* 31 >> 3) }
  }

  @Test func aDirectoryArrivesAndIsOfferedOnward() throws {
    let cluster = try Cluster()
    let (origin, first, second) = (
      try cluster.store(), try cluster.store(), try cluster.store()
    )
    defer { for store in [origin, first, second] { store.close() } }
    let scratch = ScratchDirectory()
    let weights = Self.bytes(300_001, seed: 1)
    scratch.write("m/weights", weights)
    scratch.write("m/sub/run", [1, 2], mode: 0o755)
    scratch.write("m/empty", [])
    let (info, published) = try origin.publish("model", files: [scratch["m"]], shards)
    #expect(info.bufferSizes == [2, 300_001] && info.shardCount == 6)
    try published.check()

    let (result, received) = try first.get("model", to: scratch["one"])
    #expect(result.isVerified && result.info.version == info.version)
    #expect(received.paths == ["empty", "sub/run", "weights"].map { scratch["one/" + $0] })
    try published.withdraw()
    #expect(throws: MooncakeError.self) { try origin.unregister("model") }

    let (again, copy) = try second.get("model", to: scratch["two"])
    #expect(again.sources.map(\.segment) == [first.engine.name])
    #expect(scratch.contents("two/weights") == weights)
    #expect(scratch.contents("two/sub/run") == [1, 2] && scratch.contents("two/empty") == [])
    for files in [received, copy] {
      try files.check()
      try files.withdraw()
      try files.withdraw()
    }
    #expect(try origin.list(prefix: "") == [])
    #expect(scratch.contents("one/weights") == weights)
  }

  @Test func manyFilesAreOneBuffer() throws {
    let cluster = try Cluster()
    let (origin, receiver) = (try cluster.store(), try cluster.store())
    defer {
      origin.close()
      receiver.close()
    }
    let scratch = ScratchDirectory()
    for index in 0..<300 { scratch.write("m/\(index)", Self.bytes(1 + index * 37, seed: index)) }
    scratch.write("m/large", Self.bytes(5 << 20, seed: 7))
    let before = origin.engine.metrics()
    let (_, published) = try origin.publish("many", files: [scratch["m"]], shards)
    func buffers(_ metrics: String) -> Int {
      let line = metrics.split(separator: "\n").first {
        $0.hasPrefix("mooncake_registered_buffers{")
      }
      return line?.split(separator: " ").last.flatMap { Int($0) } ?? -1
    }
    // The files, and the holding's manifest and table.
    #expect(buffers(origin.engine.metrics()) == buffers(before) + 2)
    let (_, received) = try receiver.get("many", to: scratch["out"])
    for name in ["0", "1", "299", "large"] {
      #expect(scratch.contents("out/" + name) == scratch.contents("m/" + name))
    }
    try received.withdraw()
    try published.withdraw()
    #expect(buffers(origin.engine.metrics()) == buffers(before))
  }

  @Test func bytesChangedAfterPublishingAreADigestMismatch() throws {
    let cluster = try Cluster()
    let (origin, receiver) = (try cluster.store(), try cluster.store())
    defer {
      origin.close()
      receiver.close()
    }
    let scratch = ScratchDirectory()
    scratch.write("a", Self.bytes(300_000, seed: 1))
    let (_, published) = try origin.publish("model", files: [scratch["a"]], shards)
    let file = open(scratch["a"], O_WRONLY)
    pwrite(file, [0xFF, 0xFE, 0xFD], 3, 150_000)
    close(file)
    let error = #expect(throws: MooncakeError.self) {
      _ = try receiver.get("model", to: scratch["out"])
    }
    #expect(error?.code == .digestMismatch, "\(String(describing: error))")
    #expect(error?.message.contains(origin.engine.name) == true)
    #expect(error?.message.contains("shard 2") == true)
    #expect(scratch.names() == ["a"])
    try published.withdraw()
  }

  /// A file appears at a target while a removal of the name still waits for a reader: the memory
  /// stays registered and mapped until that reader is done.
  @Test func aCommitThatFailsDuringARemoval() throws {
    let cluster = try Cluster()
    let (origin, receiver) = (try cluster.store(), try cluster.store())
    defer {
      origin.close()
      receiver.close()
    }
    let scratch = ScratchDirectory()
    scratch.write("m/a", Self.bytes(100_000, seed: 1))
    mkdir(scratch["out"], 0o755)
    let (info, published) = try origin.publish("model", files: [scratch["m"]], shards)
    let version = try #require(info.version)
    // The get has everything and waits until no other process moves files into place.
    let other = open(scratch["out"], O_RDONLY | O_DIRECTORY)
    defer { close(other) }
    try #require(flock(other, LOCK_EX) == 0)
    let failure = Lock<MooncakeError?>(nil)
    let getting = try WorkerThread.start(name: "get") {
      do throws(MooncakeError) { _ = try receiver.get("model", to: scratch["out"]) } catch {
        failure.withLock { $0 = error }
      }
    }
    #expect(eventually(within: 30_000) { receiver.readers(of: "model")?.isComplete == true })
    let holding = try #require(receiver.readers(of: "model"))
    let request = ShardRequest(
      holding: holding.address.holding, version: version, reader: 7, own: nil,
      have: ShardSet(count: 2), turn: 1, reading: [], limit: 1)
    #expect(holding.answer(request).granted.count == 1)
    try origin.remove("model")
    // It is being withdrawn.
    #expect(eventually(within: 30_000) { receiver.readers(of: "model") == nil })
    scratch.write("out/a", [9])
    flock(other, LOCK_UN)
    usleep(700_000)
    #expect(failure.withLock { $0 } == nil, "the memory was taken from a reader")
    _ = holding.answer(
      .farewell(to: holding.address, version: version, reader: 7, shardCount: 2))
    getting.join()
    #expect(failure.withLock { $0 }?.code == .exists)
    #expect(scratch.names(in: "out") == ["a"] && scratch.contents("out/a") == [9])
    try? published.withdraw()
  }

  @Test func emptyFilesAreAPayload() throws {
    let cluster = try Cluster()
    let (origin, receiver) = (try cluster.store(), try cluster.store())
    defer {
      origin.close()
      receiver.close()
    }
    let scratch = ScratchDirectory()
    scratch.write("m/a", [])
    let (info, published) = try origin.publish("void", files: [scratch["m"]])
    #expect(info.size == 0 && info.shardCount == 0)
    let (_, received) = try receiver.get("void", to: scratch["out"])
    #expect(scratch.names(in: "out") == ["a"])
    try received.withdraw()
    try published.withdraw()
  }

  @Test func aFileThatChangesWhileItIsHashed() throws {
    let cluster = try Cluster()
    let store = try cluster.store()
    defer { store.close() }
    let scratch = ScratchDirectory()
    scratch.write("m/a", Self.bytes(500_000, seed: 1))
    scratch.write("m/b", Self.bytes(500_000, seed: 2))
    var operation = StoreOperation()
    let path = scratch["m/b"]
    operation.progress = { state in
      if state.phase == .hashing { truncate(path, 100) }
      return true
    }
    do {
      _ = try store.publish("model", files: [scratch["m"]], shards, operation)
      Issue.record("a changed file was published")
    } catch {
      #expect(error.code == .digestMismatch && error.message.contains("m/b has changed"))
    }
    #expect(try store.list(prefix: "") == [])
    // The name is free and none of it is held.
    scratch.write("m/b", [1])
    let (_, files) = try store.publish("model", files: [scratch["m"]])
    try files.withdraw()
  }

  @Test func aFailedGetLeavesNothing() throws {
    let cluster = try Cluster()
    let (origin, receiver) = (try cluster.store(), try cluster.store())
    defer {
      origin.close()
      receiver.close()
    }
    let scratch = ScratchDirectory()
    scratch.write("m/a", Self.bytes(100_000, seed: 1))
    let (_, published) = try origin.publish("model", files: [scratch["m"]], shards)
    func refuses(_ code: MooncakeError.Code, _ body: () throws -> Void) {
      #expect(throws: MooncakeError.self) { try body() }
      do { try body() } catch { #expect((error as? MooncakeError)?.code == code, "\(error)") }
      #expect((try? origin.describe("model").holders.count) == 1)
    }
    scratch.write("out/a", [7])
    refuses(.exists) { _ = try receiver.get("model", to: scratch["out"]) }
    #expect(scratch.contents("out/a") == [7])

    mkdir(scratch["disk"], 0o700)
    if mount("tmpfs", scratch["disk"], "tmpfs", 0, "size=64k") == 0 {
      refuses(.full) { _ = try receiver.get("model", to: scratch["disk/out"]) }
      #expect(scratch.names(in: "disk") == [])
      umount(scratch["disk"])
    } else {
      print("a full disk is left out: mounting a small tmpfs takes root")
    }

    var operation = StoreOperation()
    operation.progress = { $0.phase != .transferring }
    refuses(.canceled) {
      _ = try receiver.get("model", to: scratch["none"], .init(), .init(), operation)
    }
    #expect(scratch.names() == ["disk", "m", "out"])
    // The same store can still fetch it.
    var options = FileOptions()
    options.replacesFiles = true
    let (_, received) = try receiver.get("model", to: scratch["out"], options)
    #expect(scratch.contents("out/a") == scratch.contents("m/a"))
    try received.withdraw()
    try published.withdraw()
  }

  @Test func removedByItsName() throws {
    let cluster = try Cluster()
    let (origin, other) = (try cluster.store(), try cluster.store())
    defer {
      origin.close()
      other.close()
    }
    let scratch = ScratchDirectory()
    scratch.write("a", [1, 2, 3])
    let (_, published) = try origin.publish("model", files: [scratch["a"]])
    try other.remove("model")
    let end = time(nil) + 30
    var failure: MooncakeError?
    while failure == nil && time(nil) < end {
      usleep(50_000)
      do throws(MooncakeError) { try published.check() } catch { failure = error }
    }
    #expect(failure?.code == .notHeld)
  }
}
