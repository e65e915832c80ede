import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Links on which everything takes long, though bytes keep arriving.
@Suite struct SlowLinkTests {
  private func store(_ cluster: Cluster, defaultMilliseconds: UInt64) throws -> P2PStore {
    var options = TransferEngine.Options()
    options.metadataURI = cluster.server.uri
    options.transports = ["tcp"]
    options.name = "node-\(UInt64.random(in: 0 ... .max))"
    options.defaultTimeoutMilliseconds = defaultMilliseconds
    return try P2PStore(engineOptions: options)
  }

  /// Ends by itself only if the test has to stop it.
  private func endless() -> StoreOperation {
    let end = Deadline.after(milliseconds: 30_000)
    var operation = StoreOperation()
    operation.timeoutMilliseconds = .max
    operation.progress = { _ in !end.hasPassed }
    return operation
  }

  @Test func aShardMayNeedLongerThanACallOfTheEngine() throws {
    let cluster = try Cluster()
    let origin = try P2PStore(engineOptions: SlowLink.options(cluster.server.uri))
    let link = try SlowLink(to: origin.engine, bytesPerSecond: 4 << 20)
    defer { link.stop() }
    let model = Memory(4 << 20, seed: 1)
    var options = RegisterOptions()
    options.shardBytes = 4 << 20
    try origin.register("m", [model.buffer], options)
    let receiver = try store(cluster, defaultMilliseconds: 300)
    let memory = Memory(4 << 20)
    _ = try receiver.get("m", into: [memory.buffer], GetOptions(), endless())
    #expect(memory.holds(model))
    // Nothing was started over.
    #expect(link.dataBytes < 6 << 20)

    let part = Memory(2 << 20)
    let other = try store(cluster, defaultMilliseconds: 300)
    receiver.close()
    try other.read(
      "m", offset: 1 << 20, into: part.bytes.baseAddress!, length: 2 << 20, endless())
    #expect(memcmp(part.bytes.baseAddress!, model.bytes.baseAddress! + 1 << 20, 2 << 20) == 0)
    withExtendedLifetime((origin, model)) {}
  }

  @Test func aLongManifestMayTakeItsTime() throws {
    let cluster = try Cluster()
    let origin = try P2PStore(engineOptions: SlowLink.options(cluster.server.uri))
    let link = try SlowLink(to: origin.engine, bytesPerSecond: 100 << 20)
    let second = try P2PStore(engineOptions: SlowLink.options(cluster.server.uri))
    let secondLink = try SlowLink(to: second.engine, bytesPerSecond: 100 << 20)
    defer {
      link.stop()
      secondLink.stop()
    }
    let model = Memory(1000, seed: 2)
    var options = RegisterOptions()
    options.attributes = Array(repeating: 7, count: 3 << 20)
    try origin.register("m", [model.buffer], options)
    _ = try second.get("m")
    let before = link.dataBytes + secondLink.dataBytes
    // Longer than silence is tolerated.
    link.setRate(1 << 20)
    secondLink.setRate(1 << 20)
    let receiver = try cluster.store()
    let memory = Memory(1000)
    let result = try receiver.get("m", into: [memory.buffer], GetOptions(), endless())
    #expect(memory.holds(model) && result.attributes == options.attributes)
    // At most once from each, if both have answered before its first byte came.
    #expect(link.dataBytes + secondLink.dataBytes - before < 7 << 20)
    withExtendedLifetime((origin, second, model)) {}
  }

  @Test func aHolderThatSendsNoManifestIsLeftForAnother() throws {
    let cluster = try Cluster()
    let origin = try cluster.store()
    let silent = try P2PStore(engineOptions: SlowLink.options(cluster.server.uri))
    let link = try SlowLink(to: silent.engine, bytesPerSecond: 100 << 20)
    defer { link.stop() }
    let model = Memory(1000, seed: 3)
    try origin.register("m", [model.buffer])
    _ = try silent.get("m")
    link.setRate(0)
    let receiver = try cluster.store()
    let memory = Memory(1000)
    let begin = Clock.now()
    _ = try receiver.get("m", into: [memory.buffer], GetOptions(), endless())
    #expect(memory.holds(model))
    #expect(Clock.now() - begin < 6_000_000_000)
    withExtendedLifetime((origin, silent, model)) {}
  }

  /// The bytes of a transfer are arriving when the store is closed.
  @Test func closeEndsATransferInTheMiddle() throws {
    let cluster = try Cluster()
    let origin = try P2PStore(engineOptions: SlowLink.options(cluster.server.uri))
    let link = try SlowLink(to: origin.engine, bytesPerSecond: 2 << 20)
    defer { link.stop() }
    let model = Memory(32 << 20, seed: 4)
    var options = RegisterOptions()
    options.isWritable = true
    options.shardBytes = 4 << 20
    try origin.register("m", [model.buffer], options)
    let calls: [(P2PStore, Memory) throws -> Void] = [
      { store, memory in _ = try store.get("m", into: [memory.buffer]) },
      { store, memory in
        try store.read("m", offset: 0, into: memory.bytes.baseAddress!, length: 32 << 20)
      },
    ]
    for call in calls {
      let receiver = try cluster.store()
      let memory = Memory(32 << 20)
      let before = link.dataBytes
      let closedAt = Atomic<UInt64>(0)
      let closer = try WorkerThread.start(name: "close") {
        _ = eventually(within: 20_000) { link.dataBytes > before + 1 << 20 }
        closedAt.store(Clock.now(), ordering: .releasing)
        receiver.close()
      }
      expect(.canceled) { try call(receiver, memory) }
      let ended = Clock.now()
      closer.join()
      #expect(link.dataBytes > before + 1 << 20)
      #expect(ended &- closedAt.load(ordering: .acquiring) < 2_000_000_000)
      // Nothing arrives any more: the memory belongs to the caller again.
      memory.bytes.initializeMemory(as: UInt8.self, repeating: 0xEE)
      usleep(300_000)
      #expect(memory.bytes.allSatisfy { $0 == 0xEE })
    }
    withExtendedLifetime((origin, model)) {}
  }
}

/// Payloads that Mooncake's store registered, read over links of many kinds.
@Suite struct UnverifiedDownloadTests {
  private final class Owner: Sendable {
    let engine: TransferEngine
    let link: SlowLink

    init(_ memory: Memory, bytesPerSecond: UInt64) throws {
      engine = try TransferEngine(SlowLink.options(nil))
      try engine.register(
        memory.bytes.baseAddress!, length: UInt64(memory.bytes.count), access: .remoteRead)
      link = try SlowLink(to: engine, bytesPerSecond: bytesPerSecond)
    }

    func close() {
      link.stop()
      engine.close()
    }
  }

  private final class Reader {
    let engine: TransferEngine
    let workers = WorkerPool(name: "test", threadLimit: 4)

    init() throws {
      var options = TransferEngine.Options()
      options.transports = ["tcp"]
      engine = try TransferEngine(options)
    }

    func close() {
      workers.stop()
      engine.close()
    }

    func download(
      _ document: UpstreamDocument, into memory: Memory,
      _ settings: UnverifiedDownload.Settings
    ) throws -> UnverifiedDownload {
      let address = UInt64(UInt(bitPattern: memory.bytes.baseAddress!))
      let layout = try #require(
        BufferLayout([.init(address: address, length: UInt64(memory.bytes.count))]))
      let bounds = Bounds(
        StoreOperation(timeoutMilliseconds: 30_000), "getting", defaultMilliseconds: 0,
        isClosed: { false })
      var download = UnverifiedDownload(
        engine, workers, document, into: layout, bounds, settings)
      try download.run(Array(document.shards.indices))
      return download
    }
  }

  private func document(
    _ memory: Memory, shardBytes: UInt64, gold: Owner
  ) throws -> UpstreamDocument {
    let size = UInt64(memory.bytes.count)
    let base = UInt64(UInt(bitPattern: memory.bytes.baseAddress!))
    return UpstreamDocument(
      name: "m", layout: try ShardLayout(bufferSizes: [size], shardBytes: shardBytes),
      segment: gold.engine.name,
      addresses: stride(from: 0, to: size, by: Int(shardBytes)).map { base + $0 })
  }

  /// The last of the concurrent reads gets its first bytes only when the first ones have ended.
  @Test func readsAreNotHurried() throws {
    let model = Memory(6 << 20, seed: 1)
    let owner = try Owner(model, bytesPerSecond: 4 << 20)
    let reader = try Reader()
    defer {
      reader.close()
      owner.close()
    }
    var settings = UnverifiedDownload.Settings()
    settings.silenceMilliseconds = 700
    let memory = Memory(6 << 20)
    _ = try reader.download(
      try document(model, shardBytes: 512 << 10, gold: owner), into: memory, settings)
    #expect(memory.holds(model))
    #expect(owner.link.dataBytes < 7 << 20)
  }

  @Test func aSilentOwnerIsWaitedForOnce() throws {
    let model = Memory(3 << 20, seed: 2)
    let silent = try Owner(model, bytesPerSecond: 0)
    let other = try Owner(model, bytesPerSecond: 100 << 20)
    let reader = try Reader()
    defer {
      reader.close()
      silent.close()
      other.close()
    }
    var settings = UnverifiedDownload.Settings()
    settings.silenceMilliseconds = 1000
    settings.windowCount = 2
    var twice = try document(model, shardBytes: 256 << 10, gold: silent)
    for index in twice.shards.indices {
      let gold = twice.shards[index].gold[0]
      twice.shards[index].replicas = [.init(segment: other.engine.name, offset: gold.offset)]
    }
    let memory = Memory(3 << 20)
    let begin = Clock.now()
    let download = try reader.download(twice, into: memory, settings)
    #expect(memory.holds(model))
    #expect(download.sources.map(\.key) == [other.engine.name])
    // Twelve shards, two at a time, would take six seconds.
    #expect(Clock.now() - begin < 4_000_000_000)
    // Without another location, the get fails and says why.
    let alone = try document(model, shardBytes: 256 << 10, gold: silent)
    do {
      _ = try reader.download(alone, into: memory, settings)
      Issue.record("bytes from a silent owner")
    } catch let error as MooncakeError {
      #expect(error.code == .noHolder && error.message.contains("sent nothing"))
    }
  }

  /// The engine gives up a read whose connection keeps breaking.
  @Test func aReadThatBrokeOffIsTriedAgain() throws {
    let model = Memory(8 << 20, seed: 3)
    let owner = try Owner(model, bytesPerSecond: 8 << 20)
    let reader = try Reader()
    let isOver = Atomic(false)
    let cutter = try WorkerThread.start(name: "cut") {
      // A piece of it has arrived, then nothing does for a while.
      _ = eventually { owner.link.dataBytes > 5 << 20 }
      for _ in 0..<8 where !isOver.load(ordering: .acquiring) {
        owner.link.cut()
        usleep(120_000)
      }
    }
    defer {
      reader.close()
      owner.close()
    }
    let memory = Memory(8 << 20)
    let result = Result {
      try reader.download(
        try document(model, shardBytes: 8 << 20, gold: owner), into: memory,
        UnverifiedDownload.Settings())
    }
    isOver.store(true, ordering: .releasing)
    cutter.join()
    _ = try result.get()
    #expect(memory.holds(model))
  }
}
