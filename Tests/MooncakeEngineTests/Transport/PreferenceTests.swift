import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Which transport moves the bytes, and what is said when none does.
struct PreferenceTests {
  private static let byteCount = 4 << 20

  /// Reads all of a target's memory and checks it.
  private func read(
    _ engine: TransferEngine, _ segment: SegmentID, _ memory: RegisteredMemory
  ) throws {
    let local = GuardedMemory(memory.count)
    try engine.transfer([
      TransferRequest(
        opcode: .read, segment: segment, source: local.address,
        targetOffset: UInt64(UInt(bitPattern: memory.address)), length: UInt64(memory.count))
    ])
    #expect(local.holdsOnly(0x47))
  }

  private func makeTarget(_ transports: [String]) throws -> (TransferEngine, RegisteredMemory) {
    let target = try makeEngine { $0.transports = transports }
    let memory = try RegisteredMemory(.ordinary, target, Self.byteCount)
    memory.fill(0x47)
    return (target, memory)
  }

  /// The order of the options decides where both transports reach the peer.
  @Test(arguments: [["shm", "tcp"], ["tcp", "shm"], ["shm"], ["tcp"]])
  func theFirstOneCarriesEverything(_ transports: [String]) throws {
    let (target, memory) = try makeTarget(["shm", "tcp"])
    defer { target.close() }
    let engine = try makeEngine { $0.transports = transports }
    defer { engine.close() }
    let segment = try engine.openSegment(target.name)
    try read(engine, segment, memory)
    let total = UInt64(Self.byteCount)
    #expect(engine.sharedBytes == (transports[0] == "shm" ? total : 0))
    #expect(engine.streamedBytes == (transports[0] == "tcp" ? total : 0))
    let reports = try engine.paths(to: segment)
    #expect(reports.map(\.transport) == transports)
    #expect(reports.map(\.movedBytes) == transports.indices.map { $0 == 0 ? total : 0 })
    #expect(reports.map(\.state) == transports.indices.map { $0 == 0 ? "used" : "standby" })
    #expect(reports.allSatisfy { $0.reason.isEmpty })
  }

  /// A peer that one transport alone reaches can be opened, and says why not another.
  @Test(arguments: [["shm"], ["tcp"]])
  func peersOfOneTransport(_ transports: [String]) throws {
    let (target, memory) = try makeTarget(transports)
    defer { target.close() }
    let engine = try makeEngine { $0.transports = ["shm", "tcp"] }
    defer { engine.close() }
    let segment = try engine.openSegment(target.name)
    try read(engine, segment, memory)
    let absent = try #require(try engine.paths(to: segment).last)
    #expect(absent.state == "none" && absent.transport != transports[0])
    #expect(
      absent.reason.contains(transports == ["shm"] ? "no TCP" : "does not share its memory"),
      "\(absent.reason)")
    #expect(try engine.descriptor(of: segment).protocolName == transports[0])
    // The target reaches itself, too.
    try read(target, 0, memory)
  }

  @Test func withoutACommonTransport() throws {
    let (target, _) = try makeTarget(["shm"])
    defer { target.close() }
    let engine = try makeEngine { $0.transports = ["tcp"] }
    defer { engine.close() }
    let error = try #require(throws: MooncakeError.self) { try engine.openSegment(target.name) }
    #expect(error.code == .unsupported)
    #expect(
      error.message.contains(target.name) && error.message.contains("serves 'shm' and no TCP"),
      "\(error.message)")
    #expect(engine.cachedSegment(target.name) == nil)
  }

  /// Descriptors that name transports nobody has, none, or contradicting ones.
  @Test func descriptorsWithoutAWay() throws {
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    var descriptor = SegmentDescriptor(name: "127.0.0.1:1", protocolName: "pigeon")
    func refusal() throws -> MooncakeError {
      let text = descriptor.json()
      let rpc = try RPCServer(
        listener: makeListener(), handlers: .init(descriptor: { text }, notify: { _ in nil }))
      defer { rpc.stop() }
      return try #require(throws: MooncakeError.self) {
        try engine.openSegment(rpc.address.description)
      }
    }
    for _ in 0..<2 {
      let error = try refusal()
      #expect(error.code == .unsupported, "\(error.message)")
      for part in ["shm: ", "tcp: ", "no way to reach it"] {
        #expect(error.message.contains(part), "\(error.message)")
      }
      // It claims TCP without a port, and shared memory of another host.
      descriptor.protocolName = "tcp"
      descriptor.hostIdentity = "elsewhere"
      descriptor.sharedMemoryName = "mooncake-of-nobody"
    }
    #expect(try refusal().message.contains("another host"))
  }

  @Test func optionsThatNameNoTransport() throws {
    let cases: [([String], MooncakeError.Code, String)] = [
      ([], .invalidArgument, "shm or tcp"), (["pigeon"], .unsupported, "shm or tcp"),
      (["tcp", "tcp"], .invalidArgument, "'tcp' twice"), (["tcp", ""], .unsupported, "''"),
    ]
    for (transports, code, words) in cases {
      let error = try #require(throws: MooncakeError.self) {
        _ = try makeEngine { $0.transports = transports }
      }
      #expect(error.code == code && error.message.contains(words), "\(error.message)")
    }
  }

  /// The only way to a peer is lost: its process has ended.
  @Test func theOnlyPathIsLost() throws {
    let (target, memory) = try makeTarget(["shm"])
    let engine = try makeEngine { $0.transports = ["shm"] }
    defer { engine.close() }
    let segment = try engine.openSegment(target.name)
    try read(engine, segment, memory)
    let address = UInt64(UInt(bitPattern: memory.address))
    target.close()
    let local = GuardedMemory(4096)
    let error = try #require(throws: MooncakeError.self) {
      try engine.transfer([
        TransferRequest(
          opcode: .read, segment: segment, source: local.address, targetOffset: address,
          length: 4096)
      ])
    }
    #expect(error.code == .unreachable || error.code == .notRegistered, "\(error)")
    #expect(error.message.contains(target.name), "\(error.message)")
  }
}

/// Transports that are added to a running engine.
struct AttachTests {
  @Test func whileTransfersRun() throws {
    let byteCount = 8 << 20
    let target = try makeEngine(.tcp)
    defer { target.close() }
    let memory = try RegisteredMemory(.ordinary, target, byteCount)
    memory.fill(0x2C)
    let engine = try makeEngine(.tcp)
    defer { engine.close() }
    let segment = try engine.openSegment(target.name)
    let local = GuardedMemory(byteCount)
    let request = TransferRequest(
      opcode: .read, segment: segment, source: local.address,
      targetOffset: UInt64(UInt(bitPattern: memory.address)), length: UInt64(byteCount))
    for round in 0..<40 {
      let batch = try engine.start([request])
      switch round {
      case 10: try target.attach("shm")
      case 20:
        try engine.attach("shm")
        // The peer has told nobody yet that it has a new transport.
        _ = try engine.openSegment(target.name)
      default: break
      }
      #expect(try engine.wait(batch).state == .completed)
      #expect(local.holdsOnly(0x2C))
      local.fill(0)
      try engine.freeBatch(batch)
    }
    #expect(engine.sharedBytes > 0 && engine.streamedBytes > 0)
    #expect(
      engine.sharedBytes + engine.streamedBytes == 40 * UInt64(byteCount))
    #expect(try engine.paths(to: segment).map(\.transport) == ["shm", "tcp"])
  }

  /// Peers that ask a metadata service learn of it, too.
  @Test func isPublished() throws {
    var options = MetadataServer.Options()
    options.port = 0
    let server = try MetadataServer(options)
    defer { server.stop() }
    let target = try makeEngine {
      $0.transports = ["tcp"]
      $0.name = "target"
      $0.metadataURI = server.uri
    }
    defer { target.close() }
    let engine = try makeEngine {
      $0.transports = ["shm", "tcp"]
      $0.metadataURI = server.uri
      $0.name = "initiator"
    }
    defer { engine.close() }
    let segment = try engine.openSegment("target")
    #expect(try engine.paths(to: segment).first { $0.transport == "shm" }?.state == "none")
    try target.attach("shm")
    #expect(try engine.openSegment("target") == segment)
    #expect(try engine.paths(to: segment).map(\.state) == ["used", "standby"])
  }

  @Test func refusals() throws {
    let engine = try makeEngine(.tcp)
    try engine.attach("tcp")
    #expect(try engine.paths(to: 0).count == 1)
    let unknown = try #require(throws: MooncakeError.self) { try engine.attach("pigeon") }
    #expect(unknown.code == .unsupported && unknown.message.contains("pigeon"))
    TransportRegistry.add(
      MooncakeEngine.TransportKind("broken") { _ throws(MooncakeError) in
        throw MooncakeError(.system, "no such device")
      })
    let broken = try #require(throws: MooncakeError.self) { try engine.attach("broken") }
    #expect(broken.code == .system)
    #expect(broken.message.contains("'broken'") && broken.message.contains("no such device"))
    #expect(try engine.paths(to: 0).count == 1)
    engine.close()
    #expect(
      failureCode { () throws(MooncakeError) in try engine.attach("shm") } == .invalidHandle)
  }
}
