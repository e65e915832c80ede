import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Registrations that could not be published to peers.
struct RefusedRegistrationTests {
  private typealias Range = (address: UInt64, length: UInt64)

  /// Ranges of one mapping, which is never touched.
  private func ranges(_ count: Int) -> [Range] {
    (0..<count).map { (0x10_0000_0000 + UInt64($0) * 8192, 4096) }
  }

  private func register(_ engine: TransferEngine, _ ranges: [Range]) throws(MooncakeError) {
    try ranges.withUnsafeBufferPointer { pointer throws(MooncakeError) in
      try engine.register(pointer, location: "*", access: [.remoteRead, .remoteWrite])
    }
  }

  private func refusal(_ engine: TransferEngine, _ ranges: [Range]) -> MooncakeError? {
    do throws(MooncakeError) {
      try register(engine, ranges)
      return nil
    } catch {
      return error
    }
  }

  @Test func peersTakeOneMessage() throws {
    let engine = try makeEngine()
    defer { engine.close() }
    let many = ranges(30_000)
    let error = try #require(refusal(engine, many))
    #expect(error.code == .full)
    for word in ["1048576", "MC_HANDSHAKE_MAX_LENGTH", "30000"] {
      #expect(error.message.contains(word), "\(error.message)")
    }
    #expect(engine.local.buffers.snapshot.buffers.isEmpty)
    // As many as fit, then one more.
    var fitting = 0
    while refusal(engine, Array(many[fitting..<fitting + 500])) == nil { fitting += 500 }
    #expect(fitting > 9000)
    #expect(engine.local.json.utf8.count < 1 << 20)
    #expect(engine.local.buffers.snapshot.buffers.count == fitting)
    let peer = try makeEngine()
    defer { peer.close() }
    let segment = try peer.openSegment(engine.name)
    #expect(try peer.descriptor(of: segment).buffers.count == fitting)
  }

  /// An engine, and the metadata server that it publishes to.
  private static func target(
    _ change: (inout MetadataLimits) -> Void
  ) throws -> (server: MetadataServer, engine: TransferEngine) {
    var limits = MetadataLimits()
    change(&limits)
    let server = try MetadataServer(MetadataServer.Options(), limits)
    let engine = try makeEngine {
      $0.metadataURI = server.uri
      $0.name = "target"
    }
    return (server, engine)
  }

  /// The caller's error if the service answers that the text is too long.
  @Test func serviceTakesNoMore() throws {
    let (server, engine) = try Self.target { $0.valueBytes = 64 << 10 }
    defer {
      engine.close()
      server.stop()
    }
    try register(engine, ranges(100))
    let more = ranges(2000).dropFirst(100)
    let begin = Clock.now()
    let error = try #require(refusal(engine, Array(more)))
    #expect(error.code == .full && error.message.contains("413"))
    #expect(Clock.now() - begin < 3_000_000_000)
    #expect(engine.local.buffers.snapshot.buffers.count == 100)
    // The next registration gets its own answer.
    #expect(refusal(engine, Array(more))?.code == .full)
    try register(engine, Array(more.prefix(100)))
    let directory = try MetadataDirectory(MetadataURI(parsing: server.uri))
    let call = Call(until: .after(milliseconds: 5000))
    #expect(try directory.descriptor(of: "target", call).buffers.count == 200)
  }

  /// A service that grants leases but refuses keys must not end up with a lease per attempt.
  @Test func attemptsThatFailUseOneLease() throws {
    let (server, engine) = try Self.target { $0.totalBytes = 16 << 10 }
    defer {
      engine.close()
      server.stop()
    }
    let client = try MetadataTestClient(port: server.address.port ?? 0)
    for kind in ["ram", "rpc_meta"] {
      #expect(try client.ask("DELETE", "/metadata?key=mooncake/\(kind)/target").status == 200)
    }
    var fillers = 0
    for size in [1000, 1] {
      let value = String(repeating: "v", count: size)
      while try client.ask("PUT", "/metadata?key=filler\(fillers)", value).status == 200 {
        fillers += 1
      }
    }
    let failures = engine.publisher?.counters.failures ?? 0
    #expect(
      eventually(within: 20_000) { (engine.publisher?.counters.failures ?? 0) >= failures + 4 })
    let health = try client.ask("GET", "/health").body
    #expect(health.contains("\"leases\":1,") || health.contains("\"leases\":2,"), "\(health)")
    for index in 0..<fillers { _ = try client.ask("DELETE", "/metadata?key=filler\(index)") }
    let store = try MetadataServices.open(MetadataURI(parsing: server.uri))
    let call = Call(until: .after(milliseconds: 20_000))
    #expect(
      eventually(within: 10_000) { (try? store.get("mooncake/ram/target", call)) ?? nil != nil })
  }

  @Test func sizeIsKnownBefore() throws {
    var descriptor = SegmentDescriptor(name: "a\"b")
    let empty = descriptor.json().utf8.count
    var expected = 0
    let rights: [Access] = [.remoteRead, .remoteWrite, [.remoteRead, .remoteWrite]]
    for (index, access) in rights.enumerated() {
      let buffer = RemoteBuffer(
        address: UInt64(4096) << UInt64(index * 12), length: UInt64(7) << UInt64(index * 9),
        access: access)
      descriptor.buffers.append(buffer)
      expected += buffer.textByteCount(nameByteCount: 6)
      let written = descriptor.json().utf8.count - empty
      #expect(written <= expected && expected <= written + 1)
    }
    let local = RemoteBuffer(address: 1, length: 1, access: .local)
    #expect(local.textByteCount(nameByteCount: 6) == 0)
  }
}
