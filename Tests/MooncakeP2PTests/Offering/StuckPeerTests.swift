import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// A process of this host is stopped in the middle of a copy while payloads are withdrawn. The
/// engine would wait thirty seconds for it.
@Suite struct StuckPeerTests {
  private static let size = 300_000

  private static func makeStore(_ cluster: Cluster) throws -> P2PStore {
    try cluster.store(transports: ["shm", "tcp"], drainMilliseconds: 50)
  }

  private func milliseconds(_ body: () throws -> Void) rethrows -> UInt64 {
    let begin = Clock.now()
    try body()
    return (Clock.now() - begin) / 1_000_000
  }

  @Test func unregisterIsBusyAtItsDeadlineAndCanBeRepeated() throws {
    let cluster = try Cluster()
    defer { withExtendedLifetime(cluster) {} }
    let store = try Self.makeStore(cluster)
    let peer = try StuckPeer(to: store.engine.descriptor(of: 0).sharedMemoryName)
    let memory = Memory(Self.size, seed: 1)
    try store.register("m", [memory.buffer])
    peer.beginCopy()
    let operation = StoreOperation(timeoutMilliseconds: 300)
    let time = milliseconds { expect(.busy) { try store.unregister("m", operation) } }
    #expect((250..<1000).contains(time), "\(time) ms")
    // Nobody finds it, and nobody gets the memory before it is free.
    expect(.notFound) { _ = try store.describe("m") }
    expect(.busy) { try store.register("n", [memory.buffer], RegisterOptions(), operation) }
    expect(.busy) { try store.unregister("m", operation) }
    peer.endCopy()
    try store.unregister("m", operation)
    expect(.notHeld) { try store.unregister("m") }
    try store.register("n", [memory.buffer])
    store.close()
  }

  @Test func aCancelEndsTheWait() throws {
    let cluster = try Cluster()
    defer { withExtendedLifetime(cluster) {} }
    let store = try Self.makeStore(cluster)
    let peer = try StuckPeer(to: store.engine.descriptor(of: 0).sharedMemoryName)
    let memory = Memory(Self.size, seed: 2)
    try store.register("m", [memory.buffer])
    peer.beginCopy()
    var operation = StoreOperation(timeoutMilliseconds: 10_000)
    let cancellation = try Cancellation()
    operation.cancellation = cancellation
    let canceled = Atomic<UInt64>(0)
    let canceler = try WorkerThread.start(name: "cancel") {
      sleepBriefly(nanoseconds: 200_000_000)
      canceled.store(Clock.now(), ordering: .sequentiallyConsistent)
      cancellation.cancel()
    }
    expect(.busy) { try store.unregister("m", operation) }
    let end = Clock.now()
    canceler.join()
    let begin = canceled.load(ordering: .sequentiallyConsistent)
    #expect(end > begin && end - begin < 500_000_000, "\((end - begin) / 1_000_000) ms")
    peer.endCopy()
    try store.unregister("m")
    store.close()
  }

  /// The wait holds no lock.
  @Test func otherPayloadsAreNotHeldUp() throws {
    let cluster = try Cluster()
    defer { withExtendedLifetime(cluster) {} }
    let store = try Self.makeStore(cluster)
    let peer = try StuckPeer(to: store.engine.descriptor(of: 0).sharedMemoryName)
    let (memory, other) = (Memory(Self.size, seed: 3), Memory(Self.size, seed: 4))
    try store.register("m", [memory.buffer])
    peer.beginCopy()
    let outcome = Lock<MooncakeError.Code?>(nil)
    let waiter = try WorkerThread.start(name: "unregister") {
      let found = code { try store.unregister("m", StoreOperation(timeoutMilliseconds: 2500)) }
      outcome.withLock { $0 = found }
    }
    sleepBriefly(nanoseconds: 200_000_000)
    let time = try milliseconds { try store.register("n", [other.buffer]) }
    #expect(time < 1000, "\(time) ms")
    #expect(outcome.withLock { $0 } == nil, "the wait was over before")
    waiter.join()
    #expect(outcome.withLock { $0 } == .busy)
    peer.endCopy()
    store.close()
  }

  /// Wherever the range begins.
  @Test func whatSharesAByteWithMemoryInUseIsBusyToo() throws {
    let cluster = try Cluster()
    defer { withExtendedLifetime(cluster) {} }
    let store = try Self.makeStore(cluster)
    let peer = try StuckPeer(to: store.engine.descriptor(of: 0).sharedMemoryName)
    let memory = Memory(Self.size, seed: 8)
    let parts = [(4096, 8192), (100_000, Self.size - 100_000)].map { offset, length in
      PayloadBuffer(address: memory.buffer.address + offset, length: UInt64(length))
    }
    try store.register("m", [parts[0]])
    peer.beginCopy()
    let operation = StoreOperation(timeoutMilliseconds: 100)
    expect(.busy) { try store.unregister("m", operation) }
    expect(.busy) { try store.register("n", [memory.buffer], RegisterOptions(), operation) }
    try store.register("n", [parts[1]], RegisterOptions(), operation)
    peer.endCopy()
    try store.unregister("m", operation)
    store.close()
  }

  /// Replaced files stay mapped.
  @Test func replacedFilesAreBusyToo() throws {
    let cluster = try Cluster()
    defer { withExtendedLifetime(cluster) {} }
    let store = try Self.makeStore(cluster)
    let peer = try StuckPeer(to: store.engine.descriptor(of: 0).sharedMemoryName)
    let folder = ScratchDirectory()
    let paths = (0..<2).map { folder.write("f\($0)", [UInt8](repeating: UInt8($0), count: 5000)) }
    let (_, former) = try store.publish("m", files: [paths[0]])
    peer.beginCopy()
    let operation = StoreOperation(timeoutMilliseconds: 100)
    let (_, present) = try store.publish("m", files: [paths[1]], RegisterOptions(), operation)
    expect(.busy) { try former.withdraw(operation) }
    peer.endCopy()
    try former.withdraw(operation)
    try present.withdraw(operation)
    store.close()
  }

  /// What the engine allocated stays mapped as long as a peer may touch it.
  @Test func aReplicaKeepsItsMemoryMeanwhile() throws {
    let cluster = try Cluster()
    defer { withExtendedLifetime(cluster) {} }
    let (origin, receiver) = (try Self.makeStore(cluster), try Self.makeStore(cluster))
    let model = Memory(Self.size, seed: 5)
    try origin.register("m", [model.buffer])
    let peer = try StuckPeer(to: receiver.engine.descriptor(of: 0).sharedMemoryName)
    let buffer = try receiver.get("m").buffers[0]
    peer.beginCopy()
    let operation = StoreOperation(timeoutMilliseconds: 100)
    expect(.busy) { try receiver.deleteReplica("m", operation) }
    memset(buffer.address, 0x11, Self.size)
    expect(.busy) { try receiver.deleteReplica("m", operation) }
    peer.endCopy()
    try receiver.deleteReplica("m", operation)
    let again = try receiver.get("m").buffers[0]
    #expect(memcmp(again.address, model.bytes.baseAddress!, Self.size) == 0)
  }

  /// A caller that ends a payload removed by its name is told.
  @Test func aRemovedPayloadIsBusyToo() throws {
    let cluster = try Cluster()
    defer { withExtendedLifetime(cluster) {} }
    let (store, other) = (try Self.makeStore(cluster), try Self.makeStore(cluster))
    let peer = try StuckPeer(to: store.engine.descriptor(of: 0).sharedMemoryName)
    let memory = Memory(Self.size, seed: 6)
    try store.register("m", [memory.buffer])
    peer.beginCopy()
    try other.remove("m")
    let operation = StoreOperation(timeoutMilliseconds: 100)
    let isWithdrawn = eventually(within: 20_000) {
      store.grantCount(of: "m") == 0 && store.engine.local.buffers.buffers.isEmpty
    }
    #expect(isWithdrawn)
    // First BUSY because the store is withdrawing it, then because of the peer.
    let end = Deadline.after(milliseconds: 5000)
    while !end.hasPassed {
      #expect(code { try store.unregister("m", operation) } == .busy)
      sleepBriefly(nanoseconds: 100_000_000)
    }
    peer.endCopy()
    #expect(eventually { code { try store.unregister("m", operation) } == nil })
    expect(.notHeld) { try store.unregister("m") }
  }

  /// A failing call reports that memory is not free.
  @Test func aFailedRegisterIsBusy() throws {
    let cluster = try Cluster()
    defer { withExtendedLifetime(cluster) {} }
    let store = try Self.makeStore(cluster)
    let peer = try StuckPeer(to: store.engine.descriptor(of: 0).sharedMemoryName)
    let memory = Memory(Self.size, seed: 7)
    peer.beginCopy()
    var operation = StoreOperation(timeoutMilliseconds: 500)
    operation.progress = { $0.phase != .publishing }
    expect(.busy) { try store.register("m", [memory.buffer], RegisterOptions(), operation) }
    expect(.notFound) { _ = try store.describe("m") }
    expect(.busy) { try store.unregister("m", StoreOperation(timeoutMilliseconds: 50)) }
    peer.endCopy()
    try store.unregister("m")
  }

  @Test func theEndOfAStoreIsBounded() throws {
    let cluster = try Cluster()
    defer { withExtendedLifetime(cluster) {} }
    let store = try Self.makeStore(cluster)
    let peer = try StuckPeer(to: store.engine.descriptor(of: 0).sharedMemoryName)
    let memories = (0..<20).map { Memory(4096, seed: UInt64($0)) }
    for (index, memory) in memories.enumerated() {
      try store.register("m\(index)", [memory.buffer])
    }
    peer.beginCopy()
    let time = milliseconds { store.close() }
    // Two seconds for the store, five for its engine.
    #expect(time < 9000, "\(time) ms")
    peer.endCopy()
  }
}
