import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import Synchronization
import Testing

/// A metadata server and its stores, all in this process.
struct Cluster {
  let server: MetadataServer

  init() throws { server = try MetadataServer(MetadataServer.Options()) }

  func store(transports: [String] = ["tcp"], drainMilliseconds: UInt64 = 2000) throws -> P2PStore {
    var engine = TransferEngine.Options()
    engine.metadataURI = server.uri
    engine.transports = transports
    engine.name = "node-\(UInt64.random(in: 0 ... .max))"
    var options = P2PStore.Options()
    options.drainMilliseconds = drainMilliseconds
    return try P2PStore(engineOptions: engine, options)
  }
}

/// A test's memory, freed with the object.
final class Memory: @unchecked Sendable {
  let bytes: UnsafeMutableRawBufferPointer

  init(_ count: Int) {
    bytes = .allocate(byteCount: count, alignment: 4096)
    bytes.initializeMemory(as: UInt8.self, repeating: 0)
  }

  /// Bytes that depend on the seed.
  init(_ count: Int, seed: UInt64) {
    bytes = .allocate(byteCount: count, alignment: 4096)
    var state = seed
    for index in stride(from: 0, to: count, by: 8) {
      state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
      for byte in index..<min(index + 8, count) {
        bytes[byte] = UInt8(truncatingIfNeeded: state >> UInt64(8 * (byte - index)))
      }
    }
  }

  deinit { bytes.deallocate() }

  var buffer: PayloadBuffer {
    PayloadBuffer(address: bytes.baseAddress!, length: UInt64(bytes.count))
  }

  func holds(_ other: Memory) -> Bool {
    bytes.count == other.bytes.count
      && memcmp(bytes.baseAddress!, other.bytes.baseAddress!, bytes.count) == 0
  }
}

/// Expects a call to fail with a code.
func expect(
  _ code: MooncakeError.Code, sourceLocation: SourceLocation = #_sourceLocation,
  _ body: () throws -> Void
) {
  do {
    try body()
    Issue.record("\(code) was expected, nothing was thrown", sourceLocation: sourceLocation)
  } catch {
    let message: Comment = "\(error)"
    #expect((error as? MooncakeError)?.code == code, message, sourceLocation: sourceLocation)
  }
}

@Suite struct P2PStoreTests {
  private var shards: RegisterOptions {
    var options = RegisterOptions()
    options.shardBytes = 64 << 10
    return options
  }

  @Test(arguments: [["tcp"], ["shm", "tcp"]])
  func whatIsRegisteredIsFetchedByItsName(transports: [String]) throws {
    let cluster = try Cluster()
    let origin = try cluster.store(transports: transports)
    let receiver = try cluster.store(transports: transports)
    let first = Memory(1_000_000, seed: 1)
    let second = Memory(77, seed: 2)
    let info = try origin.register("model/a", [first.buffer, second.buffer], shards)
    #expect(info.size == 1_000_077 && info.shardCount == 17)

    let (one, two) = (Memory(1_000_000), Memory(77))
    let result = try receiver.get("model/a", into: [one.buffer, two.buffer])
    #expect(one.holds(first) && two.holds(second))
    #expect(result.isVerified && result.info.version == info.version)
    #expect(result.sources.map(\.segment) == [origin.engine.name])
    #expect(result.sources.map(\.byteCount).reduce(0, +) == 1_000_077)

    let (described, holders) = try receiver.describe("model/a")
    #expect(described.version == info.version)
    #expect(Set(holders.map(\.segment)) == [origin.engine.name, receiver.engine.name])
    #expect(holders.allSatisfy { $0.isComplete })
    #expect(try receiver.list(prefix: "model/").map(\.name) == ["model/a"])

    // The replica suffices.
    try origin.unregister("model/a")
    let third = try cluster.store(transports: transports)
    let whole = try third.get("model/a")
    #expect(whole.buffers.count == 1 && whole.buffers[0].length == 1_000_077)
    #expect(memcmp(whole.buffers[0].address, first.bytes.baseAddress!, 1_000_000) == 0)
    #expect(whole.sources.map(\.segment) == [receiver.engine.name])
    try third.deleteReplica("model/a")
    try receiver.deleteReplica("model/a")
    expect(.notFound) { _ = try third.get("model/a") }
    #expect(try third.list(prefix: "").isEmpty)
  }

  /// The memory that a get allocates, and the manifest beside it, reach the metadata service in one
  /// piece: each further one would be waited for.
  @Test func aGetWithoutBuffersPublishesItsMemoryOnce() throws {
    let cluster = try Cluster()
    let origin = try cluster.store()
    let receiver = try cluster.store()
    let model = Memory(1_000_000, seed: 4)
    try origin.register("m", [model.buffer], shards)
    let metadata = try MetadataServices.open(MetadataURI(parsing: cluster.server.uri))
    let key = "mooncake/ram/\(receiver.engine.name)"
    let before = try metadata.list(prefix: key, from: nil, limit: 1, testCall).revision

    let result = try receiver.get("m")
    #expect(memcmp(result.buffers[0].address, model.bytes.baseAddress!, 1_000_000) == 0)
    guard
      case .changes(let changes, _) = try metadata.changes(
        prefix: key, since: before, testCall)
    else {
      Issue.record("the changes are not known any more")
      return
    }
    #expect(changes.count == 1)
  }

  @Test func manyReceiversAtOnceFeedEachOther() throws {
    let cluster = try Cluster()
    let origin = try cluster.store()
    let model = Memory(64 << 20, seed: 3)
    try origin.register("m", [model.buffer], shards)
    let stores = try (0..<4).map { _ in try cluster.store() }
    let results = Lock<[GetResult]>([])
    let threads = try stores.map { store in
      try WorkerThread.start(name: "get") {
        let memory = Memory(64 << 20)
        guard let result = try? store.get("m", into: [memory.buffer]), memory.holds(model)
        else { return }
        results.withLock { $0.append(result) }
        store.close()
      }
    }
    for thread in threads { thread.join() }
    #expect(results.withLock { $0.count } == 4)
    let sources = results.withLock { $0.flatMap(\.sources) }
    let fromOrigin = sources.filter(\.isOrigin).reduce(0) { $0 + $1.byteCount }
    let fromOthers = sources.filter { !$0.isOrigin }.reduce(0) { $0 + $1.byteCount }
    #expect(fromOrigin >= 64 << 20 && fromOthers > 0)
    #expect(fromOrigin + fromOthers == 4 * 64 << 20)
    #expect(Set(sources.map(\.segment)).count > 2)
  }

  @Test func aNameGetsANewVersion() throws {
    let cluster = try Cluster()
    let (origin, receiver) = (try cluster.store(), try cluster.store())
    let (old, new) = (Memory(300_000, seed: 4), Memory(300_000, seed: 5))
    let first = try origin.register("m", [old.buffer], shards)
    let second = try origin.register("m", [new.buffer], shards)
    #expect(first.version != second.version)
    var options = GetOptions()
    options.version = first.version
    expect(.notFound) { _ = try receiver.get("m", options) }
    let memory = Memory(300_000)
    _ = try receiver.get("m", into: [memory.buffer])
    #expect(memory.holds(new))
    var createOnly = shards
    createOnly.isCreateOnly = true
    let third = try cluster.store()
    expect(.exists) { try third.register("m", [old.buffer], createOnly) }
    expect(.exists) { try receiver.register("m", [old.buffer]) }
  }

  @Test func rangesAreReadAndWrittenInPlace() throws {
    let cluster = try Cluster()
    let (origin, other) = (try cluster.store(), try cluster.store())
    let memory = Memory(500_000, seed: 6)
    var options = shards
    options.isWritable = true
    try origin.register("w", [memory.buffer], options)
    let part = Memory(200_000)
    try other.read("w", offset: 123_456, into: part.bytes.baseAddress!, length: 200_000)
    #expect(memcmp(part.bytes.baseAddress!, memory.bytes.baseAddress! + 123_456, 200_000) == 0)
    let news = Memory(100_001, seed: 7)
    try other.write("w", offset: 65_535, from: news.bytes.baseAddress!, length: 100_001)
    #expect(memcmp(memory.bytes.baseAddress! + 65_535, news.bytes.baseAddress!, 100_001) == 0)
    expect(.invalidArgument) {
      try other.read("w", offset: 499_999, into: part.bytes.baseAddress!, length: 2)
    }
    let fixed = Memory(1000, seed: 8)
    try origin.register("fixed", [fixed.buffer])
    expect(.accessDenied) {
      try other.write("fixed", offset: 0, from: part.bytes.baseAddress!, length: 1)
    }
    // A copy of a writable payload is not offered onward.
    let copy = Memory(500_000)
    #expect(try other.get("w", into: [copy.buffer]).isVerified == false)
    #expect(copy.holds(memory))
    #expect(try other.describe("w").holders.count == 1)
  }

  @Test func aCorruptHolderIsFoundOutAndAvoided() throws {
    let cluster = try Cluster()
    let (origin, corrupt) = (try cluster.store(), try cluster.store())
    let model = Memory(2 << 20, seed: 9)
    try origin.register("m", [model.buffer], shards)
    let copy = Memory(2 << 20)
    _ = try corrupt.get("m", into: [copy.buffer])
    copy.bytes.initializeMemory(as: UInt8.self, repeating: 0xEE)
    let receiver = try cluster.store()
    let memory = Memory(2 << 20)
    let result = try receiver.get("m", into: [memory.buffer])
    #expect(memory.holds(model) && result.isVerified)
    let bad = try #require(result.sources.first { $0.segment == corrupt.engine.name })
    // Requests sent before the first shard was found to be corrupt.
    #expect((1...4).contains(bad.corruptShardCount))
    #expect(bad.byteCount == UInt64(bad.corruptShardCount) * 64 << 10)
    let good = try #require(result.sources.first { $0.isOrigin })
    #expect(good.byteCount == 2 << 20 && good.corruptShardCount == 0)
    try origin.unregister("m")
    let last = try cluster.store()
    try receiver.deleteReplica("m")
    var operation = StoreOperation()
    operation.timeoutMilliseconds = 20_000
    let begin = Clock.now()
    expect(.noHolder) { _ = try last.get("m", into: [memory.buffer], .init(), operation) }
    #expect(Clock.now() - begin < 5_000_000_000)
    #expect(try last.list(prefix: "").first?.holderCount == 1)
  }

  @Test func whatDoesNotFitIsRefusedAndLeavesNothing() throws {
    let cluster = try Cluster()
    let (origin, receiver) = (try cluster.store(), try cluster.store())
    let model = Memory(300_000, seed: 10)
    try origin.register("m", [model.buffer], shards)
    let (short, long) = (Memory(299_999), Memory(300_001))
    expect(.sizeMismatch) { _ = try receiver.get("m", into: [short.buffer]) }
    expect(.sizeMismatch) { _ = try receiver.get("m", into: [long.buffer]) }
    let (left, right) = (Memory(100_000), Memory(200_000))
    expect(.sizeMismatch) { _ = try receiver.get("m", into: [left.buffer, right.buffer]) }
    #expect(receiver.engine.local.buffers.snapshot.buffers.isEmpty)
    expect(.notHeld) { try receiver.deleteReplica("m") }
    expect(.notHeld) { try receiver.unregister("m") }
    expect(.notHeld) { try origin.deleteReplica("m") }
    for name in ["", "/a", "a\nb", String(repeating: "x", count: 513)] {
      expect(.invalidArgument) { try origin.register(name, [model.buffer]) }
      expect(.invalidArgument) { _ = try origin.get(name) }
    }
    expect(.invalidArgument) { try origin.register("e", []) }
    var tiny = RegisterOptions()
    tiny.shardBytes = 1
    let large = Memory(2 << 20)
    expect(.invalidArgument) { try origin.register("n", [large.buffer], tiny) }
  }

  @Test func cancelDeadlineAndCloseEndAGet() throws {
    let cluster = try Cluster()
    let (origin, receiver) = (try cluster.store(), try cluster.store())
    let model = Memory(300_000, seed: 11)
    try origin.register("m", [model.buffer], shards)
    let cancellation = try Cancellation()
    cancellation.cancel()
    var operation = StoreOperation()
    operation.cancellation = cancellation
    expect(.canceled) { _ = try receiver.get("m", operation: operation) }
    operation = StoreOperation()
    operation.progress = { _ in false }
    expect(.canceled) { _ = try receiver.get("m", operation: operation) }
    origin.close()
    expect(.invalidHandle) { try origin.register("m", [model.buffer]) }
    expect(.notFound) { _ = try receiver.get("m") }
    receiver.close()
    expect(.invalidHandle) { _ = try receiver.get("m") }
  }

  @Test func aRemovedNameIsWithdrawnByItsHolders() throws {
    let cluster = try Cluster()
    let (origin, receiver) = (try cluster.store(), try cluster.store())
    let model = Memory(300_000, seed: 12)
    try origin.register("m", [model.buffer], shards)
    _ = try receiver.get("m")
    try receiver.remove("m")
    let end = Deadline.after(milliseconds: 20_000)
    while try !receiver.list(prefix: "").isEmpty || receiver.describeOrNil("m") != nil {
      try #require(!end.hasPassed)
      sleepBriefly(nanoseconds: 50_000_000)
    }
    expect(.notFound) { try receiver.remove("m") }
  }

  @Test func aStoreWithoutAServiceSaysWhatToDo() throws {
    do {
      _ = try P2PStore(engineOptions: TransferEngine.Options())
      Issue.record("a store without a metadata service")
    } catch {
      #expect(error.code == .unsupported && error.message.contains("metadata serve"))
    }
  }
}

extension P2PStore {
  fileprivate func get(_ name: String, operation: StoreOperation) throws(MooncakeError) -> GetResult
  {
    try get(name, into: nil, GetOptions(), operation)
  }

  fileprivate func get(_ name: String, _ options: GetOptions) throws(MooncakeError) -> GetResult {
    try get(name, into: nil, options)
  }

  fileprivate func describeOrNil(_ name: String) throws(MooncakeError) -> PayloadInfo? {
    do throws(MooncakeError) { return try describe(name).info } catch {
      if error.code == .notFound { return nil }
      throw error
    }
  }
}
