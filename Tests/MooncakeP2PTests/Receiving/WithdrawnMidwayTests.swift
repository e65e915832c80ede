import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Synchronization
import Testing

/// An origin withdraws a writable payload and reuses its memory for another one, after it has
/// granted a write and before the peer makes it.
@Suite struct WithdrawnMidwayTests {
  private static let transports = [["tcp"], ["shm", "tcp"]]
  private static let size = 100_000

  private static let writable = {
    var options = RegisterOptions()
    options.isWritable = true
    return options
  }()

  /// An origin with a writable payload "a", which it soon withdraws, and a writer.
  private struct Writing {
    let cluster: Cluster
    let origin: P2PStore
    let writer: P2PStore
    let memory: Memory
    /// The expected contents of the memory in the end.
    let before: Memory
    let news: Memory
    let isDone = Flag()

    private static let length = 50_000

    init(transports: [String] = ["tcp"], seed: UInt64) throws {
      cluster = try Cluster()
      origin = try cluster.store(transports: transports, drainMilliseconds: 50)
      writer = try cluster.store(transports: transports)
      memory = Memory(WithdrawnMidwayTests.size, seed: seed)
      before = Memory(WithdrawnMidwayTests.size, seed: seed)
      news = Memory(Self.length, seed: seed + 1)
      try origin.register("a", [memory.buffer], WithdrawnMidwayTests.writable)
    }

    func write(
      _ name: String, _ bytes: Memory, _ operation: StoreOperation = StoreOperation()
    ) throws {
      try writer.write(
        name, offset: 10, from: bytes.bytes.baseAddress!, length: UInt64(Self.length), operation)
    }

    /// Writes until the operation has done its work: a grant that comes too fast is not noticed.
    func untilDone(_ operation: StoreOperation) throws {
      for _ in 0..<100 where !isDone.isSet { try write("a", news, operation) }
    }
  }

  private final class Flag: Sendable {
    private let value = Atomic(false)
    var isSet: Bool { value.load(ordering: .acquiring) }
    func set() { value.store(true, ordering: .releasing) }
  }

  /// Delays the peer through its progress callback, and calls `body` once it has a grant for "a".
  private func once(
    _ origin: P2PStore, isDone: Flag, _ body: @escaping @Sendable () throws -> Void
  ) -> StoreOperation {
    var operation = StoreOperation()
    operation.timeoutMilliseconds = 30_000
    operation.progress = { _ in
      if isDone.isSet { return true }
      // Longer than the interval between reports.
      let end = Deadline.after(milliseconds: 150)
      while !end.hasPassed { sleepBriefly(nanoseconds: 5_000_000) }
      if origin.grantCount(of: "a") == 0 { return true }
      isDone.set()
      do { try body() } catch { Issue.record("\(error)") }
      return true
    }
    return operation
  }

  @Test(arguments: transports)
  func bytesOfAnotherPayloadAreNoSuccessOfAGet(transports: [String]) throws {
    let cluster = try Cluster()
    let origin = try cluster.store(transports: transports, drainMilliseconds: 50)
    let receiver = try cluster.store(transports: transports)
    let (memory, copy) = (Memory(Self.size, seed: 1), Memory(Self.size))
    try origin.register("a", [memory.buffer], Self.writable)
    let isDone = Flag()
    let operation = once(origin, isDone: isDone) {
      try origin.unregister("a")
      try origin.register("b", [memory.buffer])
    }
    expect(.noHolder) {
      _ = try receiver.get("a", into: [copy.buffer], GetOptions(), operation)
    }
    #expect(isDone.isSet)
    expect(.notHeld) { try receiver.deleteReplica("a") }
    // The same without interference.
    let other = Memory(Self.size, seed: 2)
    try origin.register("a", [other.buffer], Self.writable)
    #expect(try !receiver.get("a", into: [copy.buffer]).isVerified)
    #expect(copy.holds(other))
  }

  @Test(arguments: transports)
  func bytesOfAnotherPayloadAreNoSuccessOfARead(transports: [String]) throws {
    let cluster = try Cluster()
    let origin = try cluster.store(transports: transports, drainMilliseconds: 50)
    let receiver = try cluster.store(transports: transports)
    let (memory, copy) = (Memory(Self.size, seed: 3), Memory(Self.size))
    try origin.register("a", [memory.buffer], Self.writable)
    let isDone = Flag()
    let operation = once(origin, isDone: isDone) {
      try origin.unregister("a")
      try origin.register("b", [memory.buffer])
    }
    expect(.noHolder) {
      for _ in 0..<100 where !isDone.isSet {
        try receiver.read(
          "a", offset: 10, into: copy.bytes.baseAddress!, length: 50_000, operation)
      }
    }
    withExtendedLifetime((memory, copy)) { #expect(isDone.isSet) }
  }

  @Test(arguments: transports)
  func aWriteDoesNotLandInAnotherPayload(transports: [String]) throws {
    let writing = try Writing(transports: transports, seed: 4)
    let (origin, memory, before) = (writing.origin, writing.memory, writing.before)
    let operation = once(origin, isDone: writing.isDone) {
      before.bytes.copyMemory(from: UnsafeRawBufferPointer(memory.bytes))
      try origin.unregister("a")
      // The writer may still come, so the memory cannot be opened for writing again so soon.
      var short = StoreOperation()
      short.timeoutMilliseconds = 200
      expect(.timeout) { try origin.register("b", [memory.buffer], Self.writable, short) }
    }
    expect(.noHolder) { try writing.untilDone(operation) }
    #expect(writing.isDone.isSet && memory.holds(before))
  }

  @Test func aWriteDoesNotLandInTheNextVersion() throws {
    let writing = try Writing(seed: 8)
    let (origin, memory, before) = (writing.origin, writing.memory, writing.before)
    let operation = once(origin, isDone: writing.isDone) {
      var short = StoreOperation()
      short.timeoutMilliseconds = 200
      expect(.timeout) { try origin.register("a", [memory.buffer], Self.writable, short) }
    }
    // The former version stays available.
    try writing.untilDone(operation)
    #expect(writing.isDone.isSet && !memory.holds(before))
    try origin.register("a", [memory.buffer], Self.writable)
    try writing.write("a", writing.news)
  }

  /// Takes as long as a grant: ten seconds.
  @Test func aReplacementWaitsForTheGrantsOfTheFormerVersion() throws {
    let writing = try Writing(seed: 10)
    let (origin, memory, before) = (writing.origin, writing.memory, writing.before)
    let operation = once(origin, isDone: writing.isDone) {
      before.bytes.copyMemory(from: UnsafeRawBufferPointer(memory.bytes))
      try origin.register("a", [memory.buffer], Self.writable)
      // So that a write landing now is noticed.
      memory.bytes[20] = ~memory.bytes[20]
      before.bytes[20] = memory.bytes[20]
    }
    expect(.noHolder) { try writing.untilDone(operation) }
    #expect(writing.isDone.isSet && memory.holds(before))
  }

  /// Takes as long as a grant: ten seconds.
  @Test func aWriterIsLateOnlyAsLongAsItsGrant() throws {
    let writing = try Writing(seed: 6)
    let (origin, memory, before) = (writing.origin, writing.memory, writing.before)
    let operation = once(origin, isDone: writing.isDone) {
      before.bytes.copyMemory(from: UnsafeRawBufferPointer(memory.bytes))
      try origin.unregister("a")
      // Waits for the grant to end; the writer is still stopped when it returns.
      try origin.register("b", [memory.buffer], Self.writable)
    }
    expect(.noHolder) { try writing.untilDone(operation) }
    #expect(writing.isDone.isSet && memory.holds(before))
    try writing.write("b", before)
    #expect(!memory.holds(before))
  }
}
