import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Peers that disconnect, or are disconnected, during a copy.
struct SharedMemoryHangUpTests {
  /// A disconnected peer is waited for as long as one of its threads is copying.
  @Test func hungUpInMidCopy() throws {
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    let shared = try #require(pair.initiator.sharedMemory)
    let path = try pair.initiator.sharedMemoryPath(of: pair.segment)
    let peer = try #require(path.peer)
    let memory = try RegisteredMemory(.ordinary, pair.target, 4096)
    let complaints = Complaints()
    let isTakenBack = Atomic<Bool>(false)
    var remover: WorkerThread?
    let refused = shared.copy(path, peer, totalBytes: 4096) {
      // This thread is in the middle of a run.
      peer.leave()
      usleep(50_000)
      remover = try? WorkerThread.start(name: "remover") {
        complaints.check("unregister") { try pair.target.unregister(memory.address) }
        isTakenBack.store(true, ordering: .sequentiallyConsistent)
      }
      usleep(50_000)
      let isEarly = isTakenBack.load(ordering: .sequentiallyConsistent)
      #expect(!isEarly)
      return nil
    }
    remover?.join()
    #expect(refused.isEmpty && complaints.all.isEmpty, "\(complaints.all)")
    // Nobody is copying any more, so it is forgotten.
    #expect(eventually { pair.target.sharedMemory?.server.connectionCount == 1 })
  }

  /// Repeatedly unregisters memory that a peer keeps writing to.
  private static func takeBack(
    _ memory: RegisteredMemory, _ engine: TransferEngine, rounds: Int
  ) throws {
    for round in 0..<rounds {
      try engine.unregister(memory.address)
      memory.fill(0xEE)
      usleep(1000)
      #expect(memory.holdsOnly(0xEE), "round \(round)")
      try engine.register(
        memory.address, length: UInt64(memory.count), access: [.remoteRead, .remoteWrite])
      usleep(UInt32.random(in: 0..<2000))
    }
  }

  /// A peer whose notice queue is full is disconnected. Until it notices, it may go on copying.
  @Test(arguments: MemoryKind.allCases)
  func aPeerThatDoesNotListen(_ kind: MemoryKind) throws {
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    let memory = try RegisteredMemory(kind, engine, 1 << 20)
    let peer = try PeerProcess([
      "copy", engine.name, String(UInt(bitPattern: memory.address)), String(memory.count), "write",
      "0", kind == .mapped ? "-" : "ordinary",
    ])
    defer { peer.kill() }
    #expect(try peer.readLine() == "ready")
    usleep(20_000)
    peer.stop()
    // Each allocation is offered and withdrawn.
    for _ in 0..<400 {
      let address = try engine.allocate(length: 4096, access: .remoteRead)
      try engine.free(address)
    }
    peer.resume()
    try Self.takeBack(memory, engine, rounds: 30)
    // It has noticed and reconnects by itself.
    #expect(eventually { engine.sharedMemory?.server.connectionCount == 2 })
    peer.tell()
    let words = try peer.readLine().split(separator: " ")
    try #require(words.first == "done", "\(words)")
    #expect(Int(words[1])! > 0 && UInt64(words[2])! > 0)
  }

  /// A peer without a free descriptor cannot accept an offer. It falls back to TCP and reconnects.
  @Test func anOfferThatFindsNoDescriptor() throws {
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    let memory = try RegisteredMemory(.ordinary, engine, 1 << 20)
    let peer = try PeerProcess([
      "copy", engine.name, String(UInt(bitPattern: memory.address)), String(memory.count), "write",
      "0", "ordinary,few",
    ])
    defer { peer.kill() }
    #expect(try peer.readLine() == "ready")
    for _ in 0..<20 {
      let address = try engine.allocate(length: 4096, access: .remoteRead)
      try Self.takeBack(memory, engine, rounds: 2)
      try engine.free(address)
    }
    #expect(try peer.readLine() == "lost")
    try Self.takeBack(memory, engine, rounds: 10)
    #expect(try peer.readLine() == "again")
    try Self.takeBack(memory, engine, rounds: 10)
    peer.tell()
    #expect(try peer.readLine().hasPrefix("done"))
  }

  /// A read-only peer never gets a writable descriptor, however few descriptors the owner has left.
  @Test func anOfferWithoutADescriptorThatOnlyReads() throws {
    let owner = try PeerProcess.serving(["share", String(64 << 10), "readable"])
    defer { owner.kill() }
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    let name = try engine.descriptor(of: engine.openSegment(owner.name)).sharedMemoryName
    var offered = 0
    var withdrawn = 0
    for spare in 0..<12 {
      owner.tell(String(spare))
      #expect(try owner.readLine() == "limited")
      let client = try LocalSocket.connected(to: name)
      // The greeting, then a notice about the memory, unless there is room for neither.
      guard let greeting = Self.message(client) else { continue }
      #expect(greeting.count == 2)
      guard let notice = Self.message(client) else { continue }
      if notice.isEmpty { withdrawn += 1 } else { offered += 1 }
      for descriptor in notice {
        #expect(fcntl(descriptor.value, F_GETFL) & O_ACCMODE == O_RDONLY, "\(spare) to spare")
      }
    }
    #expect(offered > 0 && withdrawn > 0)
  }

  private final class Descriptor {
    let value: Int32
    init(_ value: Int32) { self.value = value }
    deinit { close(value) }
  }

  /// The descriptors of the next message; nil if there is none.
  private static func message(_ socket: borrowing LocalSocket) -> [Descriptor]? {
    var item = pollfd(fd: socket.rawValue, events: Int16(POLLIN), revents: 0)
    if poll(&item, 1, 200) <= 0 { return nil }
    var bytes = [UInt8](repeating: 0, count: 64)
    let received = try? bytes.withUnsafeMutableBytes { try socket.receive($0) }
    guard let received, received.byteCount > 0 else { return nil }
    return received.descriptors.map(Descriptor.init)
  }
}
