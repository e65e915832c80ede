import MooncakeEngine
import MooncakeStore
import MooncakeSystem
import Synchronization
import Testing

/// An origin takes a writable payload away, and uses its memory for another one, after it has
/// granted and before the peer uses the grant.
@Suite struct WithdrawnMidwayTests {
  private static let transports = [["tcp"], ["shm", "tcp"]]
  private static let size = 100_000

  private func writable() -> RegisterOptions {
    var options = RegisterOptions()
    options.isWritable = true
    return options
  }

  private final class Flag: Sendable {
    private let value = Atomic(false)
    var isSet: Bool { value.load(ordering: .acquiring) }
    func set() { value.store(true, ordering: .releasing) }
  }

  /// Holds the peer up, by its progress callback, and calls `body` once it has a grant of "a".
  private func once(
    _ origin: P2PStore, isDone: Flag, _ body: @escaping @Sendable () throws -> Void
  ) -> StoreOperation {
    var operation = StoreOperation()
    operation.timeoutMilliseconds = 30_000
    operation.progress = { _ in
      if isDone.isSet { return true }
      // Longer than a report keeps away the next one.
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
    try origin.register("a", [memory.buffer], writable())
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
    // The same without a disturbance.
    let other = Memory(Self.size, seed: 2)
    try origin.register("a", [other.buffer], writable())
    #expect(try !receiver.get("a", into: [copy.buffer]).isVerified)
    #expect(copy.holds(other))
  }

  @Test(arguments: transports)
  func bytesOfAnotherPayloadAreNoSuccessOfARead(transports: [String]) throws {
    let cluster = try Cluster()
    let origin = try cluster.store(transports: transports, drainMilliseconds: 50)
    let receiver = try cluster.store(transports: transports)
    let (memory, copy) = (Memory(Self.size, seed: 3), Memory(Self.size))
    try origin.register("a", [memory.buffer], writable())
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
    let cluster = try Cluster()
    let origin = try cluster.store(transports: transports, drainMilliseconds: 50)
    let writer = try cluster.store(transports: transports)
    let (memory, before) = (Memory(Self.size, seed: 4), Memory(Self.size, seed: 4))
    try origin.register("a", [memory.buffer], writable())
    let news = Memory(50_000, seed: 5)
    let isDone = Flag()
    let operation = once(origin, isDone: isDone) {
      before.bytes.copyMemory(from: UnsafeRawBufferPointer(memory.bytes))
      try origin.unregister("a")
      // The writer may still come, so the memory is not open to writes again so soon.
      var short = StoreOperation()
      short.timeoutMilliseconds = 200
      expect(.timeout) { try origin.register("b", [memory.buffer], writable(), short) }
    }
    expect(.noHolder) {
      // A grant that comes too fast is not noticed.
      for _ in 0..<100 where !isDone.isSet {
        try writer.write(
          "a", offset: 10, from: news.bytes.baseAddress!, length: 50_000, operation)
      }
    }
    #expect(isDone.isSet && memory.holds(before))
  }

  @Test func aWriteDoesNotLandInTheNextVersion() throws {
    let cluster = try Cluster()
    let origin = try cluster.store(drainMilliseconds: 50)
    let writer = try cluster.store()
    let (memory, before) = (Memory(Self.size, seed: 8), Memory(Self.size, seed: 8))
    try origin.register("a", [memory.buffer], writable())
    let news = Memory(50_000, seed: 9)
    let isDone = Flag()
    let operation = once(origin, isDone: isDone) {
      var short = StoreOperation()
      short.timeoutMilliseconds = 200
      expect(.timeout) { try origin.register("a", [memory.buffer], writable(), short) }
    }
    // The former version serves on. A grant that comes too fast is not noticed.
    for _ in 0..<100 where !isDone.isSet {
      try writer.write(
        "a", offset: 10, from: news.bytes.baseAddress!, length: 50_000, operation)
    }
    #expect(isDone.isSet && !memory.holds(before))
    try origin.register("a", [memory.buffer], writable())
    try writer.write("a", offset: 10, from: news.bytes.baseAddress!, length: 50_000)
  }

  /// Takes as long as a grant: ten seconds.
  @Test func aReplacementWaitsForTheGrantsOfTheFormerVersion() throws {
    let cluster = try Cluster()
    let origin = try cluster.store(drainMilliseconds: 50)
    let writer = try cluster.store()
    let (memory, before) = (Memory(Self.size, seed: 10), Memory(Self.size, seed: 10))
    try origin.register("a", [memory.buffer], writable())
    let news = Memory(50_000, seed: 11)
    let isDone = Flag()
    let operation = once(origin, isDone: isDone) {
      before.bytes.copyMemory(from: UnsafeRawBufferPointer(memory.bytes))
      try origin.register("a", [memory.buffer], writable())
      // So that what would land now is seen.
      memory.bytes[20] = ~memory.bytes[20]
      before.bytes[20] = memory.bytes[20]
    }
    expect(.noHolder) {
      // A grant that comes too fast is not noticed.
      for _ in 0..<100 where !isDone.isSet {
        try writer.write(
          "a", offset: 10, from: news.bytes.baseAddress!, length: 50_000, operation)
      }
    }
    #expect(isDone.isSet && memory.holds(before))
  }

  /// Takes as long as a grant: ten seconds.
  @Test func aWriterIsLateOnlyAsLongAsItsGrant() throws {
    let cluster = try Cluster()
    let origin = try cluster.store(drainMilliseconds: 50)
    let writer = try cluster.store()
    let (memory, before) = (Memory(Self.size, seed: 6), Memory(Self.size, seed: 6))
    try origin.register("a", [memory.buffer], writable())
    let news = Memory(50_000, seed: 7)
    let isDone = Flag()
    let operation = once(origin, isDone: isDone) {
      before.bytes.copyMemory(from: UnsafeRawBufferPointer(memory.bytes))
      try origin.unregister("a")
      // Waits for the end of the grant; the writer still stands when it returns.
      try origin.register("b", [memory.buffer], writable())
    }
    expect(.noHolder) {
      // A grant that comes too fast is not noticed.
      for _ in 0..<100 where !isDone.isSet {
        try writer.write(
          "a", offset: 10, from: news.bytes.baseAddress!, length: 50_000, operation)
      }
    }
    #expect(isDone.isSet && memory.holds(before))
    try writer.write("b", offset: 10, from: before.bytes.baseAddress!, length: 50_000)
    #expect(!memory.holds(before))
  }
}
