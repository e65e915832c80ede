import Glibc
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Requests that wait until a stopped peer tells its present buffers.
struct RecoveryTests {
  private struct Setting {
    let peer: PeerProcess
    let engine: TransferEngine
    let segment: SegmentID
    let local = GuardedMemory(4096)

    init(_ kind: TransportKind) throws {
      peer = try PeerProcess.serving(byteCount: 1 << 20)
      engine = try makeEngine(kind)
      segment = try engine.openSegment(peer.name)
      peer.stop()
    }

    func end() {
      engine.close()
      peer.kill()
    }

    /// Reads where the peer has registered nothing.
    func start(_ offset: UInt64, milliseconds: UInt64) throws -> BatchID {
      try engine.start(
        [
          TransferRequest(
            opcode: .read, segment: segment, source: local.address,
            targetOffset: peer.address + offset, length: 4096)
        ], timeoutMilliseconds: milliseconds)
    }
  }

  /// The question for the first lasts seconds, but one that joins it ends at its own deadline.
  @Test(arguments: TransportKind.needingThePeer)
  func eachEndsAtItsOwnDeadline(_ kind: TransportKind) throws {
    let setting = try Setting(kind)
    defer { setting.end() }
    let engine = setting.engine
    let patient = try setting.start(1 << 30, milliseconds: 30_000)
    usleep(100_000)
    let begin = Clock.now()
    let hasty = try [300, 200, 250].map { try setting.start(1 << 31, milliseconds: $0) }
    for batch in hasty {
      let status = try engine.wait(batch, timeoutMilliseconds: 10_000)
      #expect(status.state == .timeout)
      #expect(engine.failureMessage(of: batch).contains("the deadline passed before the peer said"))
      try engine.freeBatch(batch)
    }
    let milliseconds = (Clock.now() - begin) / 1_000_000
    #expect((200..<1000).contains(milliseconds), "\(milliseconds) ms")
    #expect(try engine.poll(patient).state == .waiting)
    setting.peer.resume()
    let status = try engine.wait(patient, timeoutMilliseconds: 20_000)
    #expect(status.error == .notRegistered, "\(engine.failureMessage(of: patient))")
    try engine.freeBatch(patient)
  }

  /// The first deadline among several does not end the question for the others.
  @Test(arguments: TransportKind.needingThePeer)
  func theHastyDoNotEndTheQuestion(_ kind: TransportKind) throws {
    let setting = try Setting(kind)
    defer { setting.end() }
    let engine = setting.engine
    // The others wait behind this one's question, which is never answered.
    let first = try setting.start(1 << 30, milliseconds: 300)
    usleep(50_000)
    let hasty = try setting.start(1 << 31, milliseconds: 600)
    let patient = try setting.start(1 << 31, milliseconds: 30_000)
    for batch in [first, hasty] {
      #expect(try engine.wait(batch, timeoutMilliseconds: 10_000).state == .timeout)
      try engine.freeBatch(batch)
    }
    usleep(50_000)
    #expect(try engine.poll(patient).state == .waiting)
    setting.peer.resume()
    let status = try engine.wait(patient, timeoutMilliseconds: 20_000)
    #expect(status.error == .notRegistered, "\(engine.failureMessage(of: patient))")
    try engine.freeBatch(patient)
  }

  /// Eight threads deliver notifications, and all of them wait for a stopped peer.
  @Test func aNotificationEndsAtItsDeadlineWithoutAThread() throws {
    let setting = try Setting(.tcp)
    defer { setting.end() }
    let engine = setting.engine
    func start(milliseconds: UInt64) throws -> BatchID {
      let batch = try engine.createBatch(capacity: 1)
      let request = TransferRequest(
        opcode: .read, segment: setting.segment, source: setting.local.address,
        targetOffset: setting.peer.address, length: 0)
      try engine.submit(
        batch, [request], timeoutMilliseconds: milliseconds,
        notification: Notification(name: "n", message: "m"))
      return batch
    }
    let patient = try (0..<8).map { _ in try start(milliseconds: 30_000) }
    usleep(100_000)
    for milliseconds: UInt64 in [300, 100] {
      let batch = try start(milliseconds: milliseconds)
      let time = try elapsedMilliseconds {
        let status = try engine.wait(batch, timeoutMilliseconds: 10_000)
        #expect(status.error == .timeout)
      }
      #expect(time < 1000, "\(time) ms")
      try engine.freeBatch(batch)
    }
    setting.peer.resume()
    for batch in patient {
      #expect(try engine.wait(batch, timeoutMilliseconds: 20_000).state == .completed)
      try engine.freeBatch(batch)
    }
  }

  @Test(arguments: TransportKind.needingThePeer)
  func aCancelAfterTheSegmentWasClosed(_ kind: TransportKind) throws {
    let setting = try Setting(kind)
    defer { setting.end() }
    let engine = setting.engine
    let batch = try setting.start(1 << 30, milliseconds: 30_000)
    usleep(50_000)
    try engine.closeSegment(setting.segment)
    let milliseconds = try elapsedMilliseconds {
      try engine.cancel(batch)
      #expect(try engine.wait(batch, timeoutMilliseconds: 10_000).state == .canceled)
    }
    #expect(milliseconds < 500, "\(milliseconds) ms")
    try engine.freeBatch(batch)
  }
}
