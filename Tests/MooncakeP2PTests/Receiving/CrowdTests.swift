import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import Synchronization
import Testing

/// Many holders that answer but have nothing yet, as at the start of a large swarm. One engine
/// plays all of them, under a name each.
private final class Crowd: Sendable {
  let engine: TransferEngine
  let holders: [HolderAddress]

  init(_ count: Int, _ cluster: Cluster, _ manifest: Manifest) throws {
    var options = TransferEngine.Options()
    options.metadataURI = cluster.server.uri
    options.transports = ["tcp"]
    options.name = "crowd"
    let engine = try TransferEngine(options)
    self.engine = engine
    let holders = (1...UInt64(count)).map { number in
      HolderAddress(
        holding: number, rpc: engine.rpcAddress.description, segment: "crowd-\(number)")
    }
    self.holders = holders
    let size = manifest.bytes.count
    let memory = try engine.allocate(length: UInt64(size) + 16, access: .remoteRead)
    manifest.bytes.withUnsafeBytes { memory.copyMemory(from: $0.baseAddress!, byteCount: size) }
    let base = UInt64(UInt(bitPattern: memory))
    memory.storeBytes(of: base, toByteOffset: size, as: UInt64.self)
    memory.storeBytes(of: manifest.layout.size, toByteOffset: size + 8, as: UInt64.self)
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("state", 0)
    writer.member("version", manifest.version.description)
    writer.member("manifest_address", base)
    writer.member("manifest_bytes", UInt64(size))
    writer.member("table_address", base + UInt64(size))
    writer.member("buffers", 1)
    writer.endObject()
    let open = writer.text
    _ = engine.services.add { call in
      if call["op"]?.string == "open" { return open }
      return ShardAnswer(state: .serving, peers: Array(holders.shuffled().prefix(8))).json
    }
    var descriptor = try engine.descriptor(of: 0)
    let directory = try MetadataDirectory(MetadataURI(parsing: cluster.server.uri))
    for holder in holders {
      descriptor.name = holder.segment
      try directory.store.put(
        MetadataEntry(key: directory.segmentKey(holder.segment), value: descriptor.json()),
        lease: nil, testCall)
    }
  }

  deinit { engine.close() }

  /// Connections to the peers' data port.
  var connectionCount: Int { engine.tcp!.counters.connections.load(ordering: .relaxed) }
}

@Suite struct CrowdTests {
  @Test func aGetThatWaitsKeepsFewConnections() throws {
    let cluster = try Cluster()
    let layout = try ShardLayout(bufferSizes: [100_000], shardBytes: 64 << 10)
    let digests = Array(repeating: Digest(high: 1, low: 2), count: layout.shardCount)
    let manifest = try Manifest(layout: layout, digests: digests)
    let crowd = try Crowd(120, cluster, manifest)
    let teller = try cluster.store()
    for holder in crowd.holders.prefix(20) {
      teller.keeper.put(
        HolderRecord(
          PayloadSummary(
            name: "m", version: manifest.version, size: layout.size,
            shardBytes: layout.shardBytes, shardCount: UInt64(layout.shardCount), bufferCount: 1,
            publishedMilliseconds: 1, isWritable: false),
          holder: holder, isOrigin: false, isComplete: false),
        testCall)
    }
    let receiver = try cluster.store()
    let most = Lock(0)
    let opened = Lock(Set<String>())
    var operation = StoreOperation(timeoutMilliseconds: 6000)
    operation.progress = { _ in
      let count = crowd.connectionCount
      most.withLock { $0 = max($0, count) }
      for holder in crowd.holders where receiver.engine.cachedSegment(holder.segment) != nil {
        opened.withLock { _ = $0.insert(holder.segment) }
      }
      return true
    }
    let memory = Memory(100_000)
    expect(.timeout) { _ = try receiver.get("m", into: [memory.buffer], GetOptions(), operation) }
    // It knows far more holders than it has connections.
    let (connections, known) = (most.withLock { $0 }, opened.withLock { $0.count })
    #expect(known > 80, "\(known) holders were asked")
    #expect((1...60).contains(connections), "\(connections) connections at once")
  }
}
