import Glibc
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Peers whose memory cannot be reached at first.
struct SharedMemoryRetryTests {
  private static let byteCount = 4096

  /// A TCP peer that claims to share memory under another name.
  private final class Target {
    let engine: TransferEngine
    let memory: GuardedMemory
    let name: String
    private let rpc: RPCServer

    init(sharedMemoryName: String) throws {
      engine = try makeEngine(.tcp)
      memory = GuardedMemory(byteCount)
      memory.fill(0x21)
      try engine.register(memory.address, length: UInt64(byteCount), access: .remoteRead)
      let listener = try makeListener()
      let name = try listener.localAddress().description
      self.name = name
      var descriptor = engine.local.descriptor
      descriptor.name = name
      descriptor.hostIdentity = HostIdentity.current
      descriptor.sharedMemoryName = sharedMemoryName
      let text = descriptor.json()
      rpc = try RPCServer(
        listener: listener, handlers: .init(descriptor: { text }, notify: { _ in nil }))
    }

    func close() {
      rpc.stop()
      engine.close()
    }
  }

  /// A connection queue that is full when a segment is opened is only a delay.
  @Test func aFullQueue() throws {
    let listener = try SharedMemoryServer.listen()
    let crowd = Crowd(listener.name)
    #expect(crowd.count > 100)
    let target = try Target(sharedMemoryName: listener.name)
    defer { target.close() }
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    let segment = try engine.openSegment(target.name)
    #expect(try engine.sharedMemoryPeer(of: segment) == nil)
    #expect(try engine.sharedMemoryFailure(of: segment)?.contains("connect") ?? false)
    let local = GuardedMemory(Self.byteCount)
    let request = TransferRequest(
      opcode: .read, segment: segment, source: local.address,
      targetOffset: UInt64(UInt(bitPattern: target.memory.address)), length: UInt64(Self.byteCount))
    try engine.transfer([request])
    #expect(engine.streamedBytes == UInt64(Self.byteCount) && engine.sharedBytes == 0)

    // The owner accepts from its queue again.
    crowd.leave()
    let owner = try SharedMemoryTransport(
      makeContext(buffers: target.engine.local.buffers), listener: listener)
    defer { _ = owner.stop(until: .after(milliseconds: 5000)) }
    owner.server.publish()
    var rounds = 0
    let isShared = eventually {
      local.fill(0)
      try? engine.transfer([request])
      rounds += 1
      return local.holdsOnly(0x21) && engine.sharedBytes > 0
    }
    #expect(isShared && rounds < 10_000, "\(rounds) rounds")
    #expect(try engine.sharedMemoryFailure(of: segment) == nil)
  }

  /// The pauses between attempts grow, and only one attempt runs at a time.
  @Test func restsGrow() {
    let health = PathHealth()
    #expect(!health.isDue() && health.failure == nil)
    var rests: [UInt64] = []
    for round in 0..<4 {
      #expect(health.noteFailure("full", isFinal: false) == (round == 0))
      let milliseconds = elapsedMilliseconds {
        while !health.isDue() { usleep(200) }
      }
      rests.append(milliseconds)
      #expect(health.beginAttempt() && !health.beginAttempt() && !health.isDue())
    }
    #expect(rests[0] >= 4 && rests[1] >= 9 && rests[2] >= 19 && rests[3] >= 39, "\(rests)")
    #expect(health.failure == "full")
    #expect(health.noteFailure("another user", isFinal: true))
    usleep(100_000)
    #expect(!health.isDue() && !health.beginAttempt())
  }

  /// Connections that fill a queue.
  private final class Crowd {
    private var descriptors: [Int32] = []

    init(_ name: String) {
      while descriptors.count < 1000, let socket = try? LocalSocket.connected(to: name) {
        descriptors.append(dup(socket.rawValue))
      }
    }

    deinit { leave() }

    var count: Int { descriptors.count }

    func leave() {
      for descriptor in descriptors { close(descriptor) }
      descriptors = []
    }
  }
}
