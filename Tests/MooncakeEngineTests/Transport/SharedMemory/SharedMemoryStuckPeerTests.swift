import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Peers of the same user that break the rules.
struct SharedMemoryStuckPeerTests {
  private static func makeImpatientEngine() throws -> TransferEngine {
    try makeEngine(.sharedMemory) { $0.defaultTimeoutMilliseconds = 300 }
  }

  /// A copy that never ends blocks `unregister` for a bounded time, and the error says so.
  /// Meanwhile the memory is offered to nobody, and a later call completes it.
  @Test func unregisterGivesUp() throws {
    let engine = try Self.makeImpatientEngine()
    defer { engine.close() }
    let client = try StuckPeer(to: engine.descriptor(of: 0).sharedMemoryName)
    let memory = try RegisteredMemory(.ordinary, engine, 4096)
    let other = try RegisteredMemory(.ordinary, engine, 4096)
    client.claim(thread: linux_gettid())
    func unregister(_ memory: RegisteredMemory) -> MooncakeError.Code? {
      failureCode { () throws(MooncakeError) in try engine.unregister(memory.address) }
    }
    let first = elapsedMilliseconds { #expect(unregister(memory) == .busy) }
    #expect(first >= 300 && first < 3000, "\(first) ms")
    // Later calls wait less for a peer that was late before.
    let second = elapsedMilliseconds {
      #expect(unregister(memory) == .busy)
      #expect(unregister(other) == .busy)
    }
    #expect(second < 300, "\(second) ms")
    #expect(engine.local.buffers.buffers.isEmpty)
    client.claim(thread: 0)
    #expect(unregister(memory) == nil && unregister(other) == nil)
    #expect(unregister(memory) == .notRegistered)
  }

  /// Memory that a peer may still touch is not unmapped.
  @Test func freeGivesUp() throws {
    let engine = try Self.makeImpatientEngine()
    defer { engine.close() }
    let client = try StuckPeer(to: engine.descriptor(of: 0).sharedMemoryName)
    let address = try engine.allocate(length: 4096, access: [.remoteRead, .remoteWrite])
    client.claim(thread: linux_gettid())
    func free() -> MooncakeError.Code? {
      failureCode { () throws(MooncakeError) in try engine.free(address) }
    }
    #expect(free() == .busy)
    memset(address, 0x11, 4096)
    client.claim(thread: 0)
    #expect(free() == nil && free() == .notRegistered)
  }

  /// Closing the engine does not unmap it either, and does not wait forever.
  @Test func closeGivesUp() throws {
    let engine = try Self.makeImpatientEngine()
    let client = try StuckPeer(to: engine.descriptor(of: 0).sharedMemoryName)
    let address = try engine.allocate(length: 4096, access: [.remoteRead, .remoteWrite])
    client.claim(thread: linux_gettid())
    let milliseconds = elapsedMilliseconds { engine.close() }
    #expect(milliseconds < 3000, "\(milliseconds) ms")
    memset(address, 0x11, 4096)
    client.claim(thread: 0)
  }

  /// A thread that has exited is not copying, whatever its slot says.
  @Test func aThreadThatIsGone() throws {
    let engine = try Self.makeImpatientEngine()
    defer { engine.close() }
    let client = try StuckPeer(to: engine.descriptor(of: 0).sharedMemoryName)
    let memory = try RegisteredMemory(.ordinary, engine, 4096)
    let number = Atomic<Int32>(0)
    try onThreads(1) { _ in number.store(linux_gettid(), ordering: .sequentiallyConsistent) }
    client.claim(thread: number.load(ordering: .sequentiallyConsistent))
    let milliseconds = try elapsedMilliseconds { try engine.unregister(memory.address) }
    #expect(milliseconds < 250, "\(milliseconds) ms")
  }

  /// An owner that sends offers without end is disconnected.
  @Test func offersWithoutEnd() throws {
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    let transport = try #require(engine.sharedMemory)
    let name = "mooncake-test-\(UInt64.random(in: 0 ... .max))"
    let listener = try LocalSocket.listening(on: name)
    let complaints = Complaints()
    let offers = Atomic<Int>(0)
    let owner = try WorkerThread.start(name: "owner") {
      complaints.check("owner") { try Self.offerWithoutEnd(listener, offers) }
    }
    var descriptor = try engine.descriptor(of: 0)
    descriptor.sharedMemoryName = name
    let paths = try transport.connect(
      to: descriptor, former: [], for: SegmentLink(descriptor.name, nil), deadline: .never)
    let peer = try #require((paths.first as? SharedMemoryPath)?.peer)
    let isOver = eventually { !peer.isUsable }
    #expect(isOver)
    owner.join()
    #expect(complaints.all.isEmpty, "\(complaints.all)")
    let count = offers.load(ordering: .sequentiallyConsistent)
    #expect(count < 2000, "\(count) offers were taken")
  }

  private static func offerWithoutEnd(
    _ listener: borrowing LocalSocket, _ offers: borrowing Atomic<Int>
  ) throws {
    var item = pollfd(fd: listener.rawValue, events: Int16(POLLIN), revents: 0)
    guard poll(&item, 1, 5000) > 0, let socket = try listener.accept() else {
      throw Errno.timedOut
    }
    let table = try MemoryFile(name: "table", byteCount: 128 + 32 << 20)
    let slots = try MemoryFile(name: "slots", byteCount: 4096)
    let greeting: [UInt64] = [0x0001_4D48_534E_4F4D, 0, 0, 0]
    try greeting.withUnsafeBytes {
      try socket.send($0, descriptors: [table.descriptor.rawValue, slots.descriptor.rawValue])
    }
    let end = Deadline.after(milliseconds: 10_000)
    var number: UInt64 = 1
    while !end.hasPassed {
      let notice: [UInt64] = [1 | number << 32, 4096, 1]
      do {
        try notice.withUnsafeBytes {
          try socket.send($0, descriptors: [slots.descriptor.rawValue])
        }
        number += 1
        offers.store(Int(number), ordering: .sequentiallyConsistent)
      } catch {
        if error as? Errno != .wouldBlock { return }
        usleep(200)
      }
    }
  }
}
