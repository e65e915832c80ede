import Glibc
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// A write without an answer may still be stored. It is not sent again, and nothing is written over
/// it, before the peer has closed its connection.
struct TCPFenceTests {
  private static let size = 64 << 10

  /// An initiator, and a peer whose first connection waits until it is released.
  private final class Scene {
    let isReleased = Box(false)
    let peer: FakePeer
    let engine: TransferEngine
    let segment: SegmentID
    let local = GuardedMemory(8 * TCPFenceTests.size)
    /// "close" when the first connection ends, and the offsets of writes on others.
    let events = Box<[String]>([])

    /// `atFirst`: what the first connection does once released.
    init(
      connections: Int = 1, version: Int = 2,
      atFirst: @escaping @Sendable (FakeConnection) -> Void = { $0.awaitClose() }
    ) throws {
      peer = try FakePeer(version: version) { [isReleased, events] connection in
        if connection.index == 0 {
          _ = eventually(within: 20_000) { isReleased.value }
          atFirst(connection)
          events.update { $0.append("close") }
          return
        }
        while let header = connection.header() {
          let offset = Int(header.address - FakePeer.bufferAddress) / TCPFenceTests.size
          events.update { $0.append("\(header.opcode) \(offset)") }
          if header.opcode == .write, connection.receive(Int(header.size)) == nil { return }
          connection.sendStatus()
          if header.opcode == .read {
            connection.send([UInt8](repeating: 0x77, count: Int(header.size)))
          }
        }
      }
      engine = try makeEngine { $0.connectionsPerPeer = connections }
      segment = try engine.openSegment(peer.name)
    }

    func request(_ opcode: Opcode, _ offset: Int) -> TransferRequest {
      TransferRequest(
        opcode: opcode, segment: segment, source: local.address + offset * TCPFenceTests.size,
        targetOffset: FakePeer.bufferAddress + UInt64(offset * TCPFenceTests.size),
        length: UInt64(TCPFenceTests.size))
    }

    func start(
      _ opcode: Opcode, _ offset: Int, _ timeoutMilliseconds: UInt64 = 10_000
    ) throws -> BatchID {
      try engine.start([request(opcode, offset)], timeoutMilliseconds: timeoutMilliseconds)
    }

    func state(_ batch: BatchID) throws -> TransferState {
      try engine.wait(batch, timeoutMilliseconds: 20_000).state
    }

    func close() {
      isReleased.value = true
      engine.close()
      peer.stop()
    }
  }

  @Test(arguments: [true, false])
  func aNeighborIsSentAgainOnlyBehindTheFence(_ cancels: Bool) throws {
    let scene = try Scene()
    defer { scene.close() }
    let first = try scene.start(.write, 0, cancels ? 10_000 : 150)
    let neighbor = try scene.start(.write, 1)
    usleep(50_000)
    let milliseconds = try elapsedMilliseconds {
      if cancels { try scene.engine.cancel(first) }
      #expect(try scene.state(first) == (cancels ? .canceled : .timeout))
    }
    #expect(milliseconds < 1000, "the end waited for the peer")
    #expect(scene.engine.failureMessage(of: first).contains("may still store it"))
    usleep(200_000)
    #expect(try scene.engine.poll(neighbor).state == .waiting)
    #expect(scene.events.value.isEmpty, "a write was sent again while the first may still land")
    scene.isReleased.value = true
    #expect(try scene.state(neighbor) == .completed)
    #expect(scene.events.value == ["close", "write 1"])
  }

  /// On every connection, and after opening the segment again.
  @Test func laterWritesThereWait() throws {
    let scene = try Scene(connections: 2)
    defer { scene.close() }
    let first = try scene.start(.write, 0, 100)
    #expect(try scene.state(first) == .timeout)
    let again = try (0..<4).map { _ in try scene.start(.write, 0) }
    // Reads, and writes that touch nothing of it, do not wait.
    try scene.engine.transfer([scene.request(.write, 1)], timeoutMilliseconds: 3000)
    try scene.engine.transfer([scene.request(.read, 0)], timeoutMilliseconds: 3000)
    #expect(scene.events.value == ["write 1", "read 0"])
    for batch in again { #expect(try scene.engine.poll(batch).state == .waiting) }
    try scene.engine.cancel(again[3])
    #expect(try scene.state(again[3]) == .canceled)
    let late = try scene.start(.write, 0, 100)
    #expect(try scene.state(late) == .timeout)
    #expect(scene.engine.failureMessage(of: late).contains("earlier write there"))

    try scene.engine.closeSegment(scene.segment)
    #expect(try scene.engine.openSegment(scene.peer.name) != scene.segment)
    let reopened = try scene.engine.openSegment(scene.peer.name)
    var request = scene.request(.write, 0)
    request.segment = reopened
    let anew = try scene.engine.start([request], timeoutMilliseconds: 10_000)
    usleep(100_000)
    #expect(scene.events.value == ["write 1", "read 0"])
    scene.isReleased.value = true
    for batch in again.prefix(3) + [anew] { #expect(try scene.state(batch) == .completed) }
    #expect(
      Array(scene.events.value.dropFirst(2)) == ["close"] + Array(repeating: "write 0", count: 4))
  }

  /// A reset by the peer is a fence, and so is its refusal of a request.
  @Test func whatThePeerEndedIsSentAgainAtOnce() throws {
    let scene = try Scene(atFirst: { connection in
      _ = connection.header()
      connection.reset()
    })
    defer { scene.close() }
    let batches = try (0..<2).map { try scene.start(.write, $0, 5000) }
    usleep(50_000)
    scene.isReleased.value = true
    for batch in batches { #expect(try scene.state(batch) == .completed) }
    #expect(Set(scene.events.value) == ["close", "write 0", "write 1"])
  }

  /// A peer that is blocked on sending an answer must be able to send it before it sees the end.
  @Test func answersAreTakenMeanwhile() throws {
    let scene = try Scene(atFirst: { connection in
      // Far more than the sockets can hold.
      _ = connection.header()
      connection.sendStatus()
      connection.send([UInt8](repeating: 1, count: 32 << 20))
      connection.awaitClose()
    })
    defer { scene.close() }
    var read = scene.request(.read, 0)
    read.length = UInt64(TCPFenceTests.size)
    let first = try scene.engine.start([read], timeoutMilliseconds: 10_000)
    let neighbor = try scene.start(.write, 1)
    usleep(50_000)
    scene.local.fill(0xCC)
    try scene.engine.cancel(first)
    #expect(try scene.state(first) == .canceled)
    scene.isReleased.value = true
    #expect(try scene.state(neighbor) == .completed)
    #expect(scene.local.holdsOnly(0xCC), "an answer landed after its request was canceled")
    #expect(scene.events.value == ["close", "write 1"])
  }

  /// Canceled reads leave nothing at the target, so nothing waits.
  @Test func readsNeedNoFence() throws {
    let scene = try Scene()
    defer { scene.close() }
    let first = try scene.start(.read, 0, 100)
    let neighbor = try scene.start(.read, 1)
    #expect(try scene.state(first) == .timeout)
    #expect(!scene.engine.failureMessage(of: first).contains("may still"))
    #expect(try scene.state(neighbor) == .completed)
    #expect(scene.events.value == ["read 1"])
  }

  /// The wait is bounded: then the sent write fails, and later ones to the same place fail at once;
  /// both errors say why. If the peer ends the connection after all, writes work again.
  @Test func aPeerThatNeverCloses() throws {
    let scene = try Scene()
    defer { scene.close() }
    let first = try scene.start(.write, 0, 100)
    let neighbor = try scene.start(.write, 1, 60_000)
    #expect(try scene.state(first) == .timeout)
    let waiting = try scene.start(.write, 0, 60_000)
    let waited = try elapsedMilliseconds {
      let states = [try scene.state(neighbor), try scene.state(waiting)]
      #expect(states == [.failed, .failed])
    }
    #expect((9000..<15_000).contains(waited))
    #expect(scene.engine.failureMessage(of: neighbor).contains("it was sent, not answered"))
    #expect(scene.engine.failureMessage(of: waiting).contains("an earlier write there"))
    let late = try scene.start(.write, 1, 60_000)
    let milliseconds = try elapsedMilliseconds {
      let state = try scene.state(late)
      #expect(state == .failed)
    }
    #expect(milliseconds < 500)
    #expect(try scene.engine.poll(late).error == .unreachable)
    #expect(scene.events.value.isEmpty)
    try scene.engine.transfer([scene.request(.write, 2)], timeoutMilliseconds: 3000)
    scene.isReleased.value = true
    #expect(
      eventually(within: 5000) {
        (try? scene.engine.transfer([scene.request(.write, 0)], timeoutMilliseconds: 1000)) != nil
      })
  }

  /// A version 1 server that closes before it has read everything has not stored it.
  @Test func anEarlyEndIsNoReceipt() throws {
    let peer = try FakePeer(version: 0) { connection in
      _ = connection.header()
      usleep(50_000)
    }
    defer { peer.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    // More than the peer's side takes unread, less than both sides take.
    let local = GuardedMemory(1 << 20)
    for count in [300 << 10, 600 << 10, 1 << 20] {
      let batch = try engine.start(
        [
          TransferRequest(
            opcode: .write, segment: segment, source: local.address,
            targetOffset: FakePeer.bufferAddress, length: UInt64(count))
        ], timeoutMilliseconds: 5000)
      let state = try engine.wait(batch, timeoutMilliseconds: 10_000).state
      #expect(state != .completed, "\(count) bytes")
    }
  }

  private final class Waiter: WriteGateWaiter {
    let changes = Atomic<Int>(0)
    func gateChanged() { changes.wrappingAdd(1, ordering: .relaxed) }
  }

  @Test func rangesOfSeveralConnections() throws {
    let waiter = Waiter()
    let ranges = WriteGate()
    #expect(ranges.isEmpty)
    let first = ranges.add([100..<200, 300..<400], isOverdue: false)
    let second = ranges.add([350..<500], isOverdue: false)
    func verdict(_ address: UInt64, _ count: Int) -> WriteGate.Verdict {
      ranges.verdict(address, count, for: waiter)
    }
    #expect(verdict(200, 100) == .free && verdict(0, 100) == .free && verdict(500, 1) == .free)
    #expect(verdict(0, 101) == .pending && verdict(199, 1) == .pending)
    #expect(waiter.changes.load(ordering: .relaxed) == 0)
    ranges.markOverdue(second)
    #expect(waiter.changes.load(ordering: .relaxed) == 1)
    #expect(verdict(360, 1) == .overdue && verdict(310, 1) == .pending)
    ranges.remove(second)
    #expect(verdict(360, 1) == .pending && verdict(450, 1) == .free)
    ranges.remove(first)
    #expect(ranges.isEmpty && verdict(100, 400) == .free)
    // Too many to distinguish: nothing is written.
    let many = (0..<16).map { ranges.add([$0..<$0 + 1], isOverdue: false) }
    #expect(verdict(1 << 40, 1) == .pending)
    ranges.remove(many[3])
    #expect(verdict(1 << 40, 1) == .free)
  }
}
