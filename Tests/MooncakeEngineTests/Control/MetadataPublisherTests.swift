import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// A publisher with a lease of its own length, on a server in this process.
struct MetadataPublisherTests {
  private var call: Call { Call(until: .after(milliseconds: 5000)) }

  private func server(port: UInt16 = 0) throws -> MetadataServer {
    var options = MetadataServer.Options()
    options.port = port
    return try MetadataServer(options)
  }

  private func publisher(
    _ engine: TransferEngine, _ server: MetadataServer, ttlMilliseconds: UInt64
  ) throws -> MetadataPublisher {
    var settings = MetadataSettings()
    settings.ttlMilliseconds = ttlMilliseconds
    let directory = try MetadataDirectory(MetadataURI(parsing: server.uri), settings: settings)
    let publisher = MetadataPublisher(
      directory, engine.local, rpcAddress: HostPort(host: "127.0.0.1", port: 1),
      untilClose: Call(until: .never))
    try publisher.start(until: call.deadline)
    return publisher
  }

  /// A put does not renew the lease, so puts must not take the place of renewals.
  @Test func constantChangesLoseNoLease() throws {
    let server = try server()
    defer { server.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let publisher = try publisher(engine, server, ttlMilliseconds: 2000)
    defer { publisher.stop() }
    let memory = GuardedMemory(4096)
    let begin = Clock.now()
    while Clock.now() - begin < 5_000_000_000 {
      try engine.register(memory.address, length: 4096, access: .remoteRead)
      try publisher.publishChanges(call)
      try engine.unregister(memory.address)
      try publisher.publishChanges(call)
      usleep(50_000)
    }
    let counters = publisher.counters
    #expect(counters.repetitions == 0 && counters.failures == 0, "\(counters)")
    #expect(counters.renewals >= 4, "\(counters)")
  }

  /// The service has lost the lease, and a registration is what finds out.
  @Test func changesUnderALostLease() throws {
    let first = try server()
    let port = try #require(first.address.port)
    let engine = try makeEngine()
    defer { engine.close() }
    // No renewal comes in between.
    let publisher = try publisher(engine, first, ttlMilliseconds: 120_000)
    defer { publisher.stop() }
    first.stop()
    let second = try server(port: port)
    defer { second.stop() }
    let memory = GuardedMemory(4096)
    try engine.register(memory.address, length: 4096, access: .remoteRead)
    try publisher.publishChanges(call)
    let store = try MetadataServices.open(MetadataURI(parsing: second.uri))
    let text = try #require(try store.get("mooncake/ram/\(engine.name)", call))
    #expect(try SegmentDescriptor(json: text).buffers.count == 1)
    #expect(try store.get("mooncake/rpc_meta/\(engine.name)", call) != nil)
    let counters = publisher.counters
    #expect(counters.repetitions == 1 && counters.isReachable, "\(counters)")
  }
}
