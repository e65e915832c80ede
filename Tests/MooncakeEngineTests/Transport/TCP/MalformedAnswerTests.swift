import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Targets with wrong answers, in every way the framing allows.
struct MalformedAnswerTests {
  private static let count = 64 << 10

  /// Reads or writes once through a peer that runs `script`; returns how it ended.
  private static func outcome(
    _ opcode: Opcode = .read, version: Int = 2, count: Int = count, timeout: UInt64 = 10_000,
    local: GuardedMemory? = nil, _ script: @escaping FakePeer.Script
  ) throws -> MooncakeError? {
    let peer = try FakePeer(version: version, script: script)
    defer { peer.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = local ?? GuardedMemory(count)
    var failure: MooncakeError?
    do throws(MooncakeError) {
      try engine.transfer(
        [
          TransferRequest(
            opcode: opcode, segment: segment, source: local.address,
            targetOffset: FakePeer.bufferAddress, length: UInt64(count))
        ], timeoutMilliseconds: timeout)
    } catch {
      failure = error
    }
    #expect(local.areGuardsIntact)
    return failure
  }

  /// Reads a whole request and answers it with these bytes.
  private static func answering(_ bytes: [UInt8]) -> FakePeer.Script {
    { connection in
      guard let header = connection.header() else { return }
      if header.opcode == .write { _ = connection.receive(Int(header.size)) }
      connection.send(bytes)
    }
  }

  @Test(arguments: [Opcode.read, .write])
  func wrongMagic(_ opcode: Opcode) throws {
    let milliseconds = try elapsedMilliseconds {
      let error = try Self.outcome(opcode, Self.answering([UInt8](repeating: 0x20, count: 4096)))
      #expect(error?.code == .protocolViolation)
    }
    #expect(milliseconds < 4000)
  }

  @Test(arguments: [Opcode.read, .write])
  func unknownStatus(_ opcode: Opcode) throws {
    let word = TCPWire.statusOK | 7
    let error = try Self.outcome(opcode, Self.answering(FakeConnection.frame(word)))
    #expect(error?.code == .protocolViolation)
    #expect(error?.message.contains("code 7") == true)
  }

  @Test(arguments: [Opcode.read, .write])
  func refusal(_ opcode: Opcode) throws {
    let error = try Self.outcome(
      opcode, Self.answering(FakeConnection.frame(TCPWire.statusRejected)))
    #expect(error?.code == .notRegistered)
  }

  /// Refused before all data is sent, and the rest not received.
  @Test func earlyRefusal() throws {
    let error = try Self.outcome(.write, count: 16 << 20) { connection in
      guard connection.header() != nil else { return }
      connection.sendStatus(TCPWire.statusRejected)
      connection.awaitClose()
    }
    #expect(error?.code == .notRegistered)
  }

  @Test func truncatedFrame() throws {
    let error = try Self.outcome { connection in
      guard connection.header() != nil else { return }
      connection.send(Array(FakeConnection.frame(TCPWire.statusOK).prefix(3)))
    }
    #expect(error?.code == .unreachable)
    #expect(error?.message.contains("after 3 bytes") == true)
  }

  @Test func truncatedPayload() throws {
    let error = try Self.outcome { connection in
      guard connection.header() != nil else { return }
      connection.sendStatus()
      connection.send([UInt8](repeating: 1, count: 1000))
    }
    #expect(error?.code == .unreachable)
  }

  /// A request broken off on one connection is completed on the next.
  @Test func truncatedOnce() throws {
    let local = GuardedMemory(Self.count)
    let error = try Self.outcome(local: local) { connection in
      if connection.index == 0 {
        guard connection.header() != nil else { return }
        connection.sendStatus()
        connection.send([UInt8](repeating: 0x11, count: Self.count - 1))
        return
      }
      while connection.serveOne(reading: 0x22) {}
    }
    #expect(error == nil)
    #expect(local.holdsOnly(0x22))
  }

  /// A peer that closes without an answer is not asked forever.
  @Test func closesAtOnce() throws {
    let milliseconds = try elapsedMilliseconds {
      let error = try Self.outcome(timeout: 20_000) { _ in }
      #expect(error?.code == .unreachable)
    }
    #expect(milliseconds < 8000)
  }

  @Test func halfAFrameThenSilence() throws {
    let error = try Self.outcome(timeout: 300) { connection in
      guard connection.header() != nil else { return }
      connection.send(Array(FakeConnection.frame(TCPWire.statusOK).prefix(5)))
      connection.awaitClose()
    }
    #expect(error?.code == .timeout)
  }

  @Test func byteByByte() throws {
    let local = GuardedMemory(300)
    let error = try Self.outcome(count: 300, local: local) { connection in
      while let header = connection.header() {
        let payload = (0..<Int(header.size)).map { UInt8(truncatingIfNeeded: $0) }
        for byte in FakeConnection.frame(TCPWire.statusOK) + payload {
          connection.send([byte])
          usleep(50)
        }
      }
    }
    #expect(error == nil)
    #expect(local.bytes.enumerated().allSatisfy { $1 == UInt8(truncatingIfNeeded: $0) })
  }

  /// The answers to several requests in flight, split in two at every possible place.
  @Test func answersCutAnywhere() throws {
    let size = 5
    let whole = 3 * (TCPWire.statusBytes + size)
    let cut = Box(1)
    let peer = try FakePeer { connection in
      while true {
        var answer: [UInt8] = []
        for _ in 0..<3 {
          guard let header = connection.header() else { return }
          answer += FakeConnection.frame(TCPWire.statusOK)
          let first = UInt8(header.address - FakePeer.bufferAddress)
          answer += (0..<UInt8(header.size)).map { first + $0 }
        }
        connection.send(Array(answer.prefix(cut.value)))
        usleep(3000)
        connection.send(Array(answer.dropFirst(cut.value)))
      }
    }
    defer { peer.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(3 * size)
    for place in 1..<whole {
      cut.value = place
      local.fill(0xCC)
      try engine.transfer(
        (0..<3).map { index in
          TransferRequest(
            opcode: .read, segment: segment, source: local.address + index * size,
            targetOffset: FakePeer.bufferAddress + UInt64(index * size), length: UInt64(size))
        })
      #expect(local.bytes.elementsEqual((0..<UInt8(3 * size)).map { $0 }), "cut at \(place)")
    }
    #expect(local.areGuardsIntact)
  }

  /// A refusal behind another answer, split in two at every place: its first bytes must not be
  /// taken as part of the previous frame.
  @Test(arguments: 1..<TCPWire.statusBytes)
  func refusalCutAnywhere(_ cut: Int) throws {
    let peer = try FakePeer { connection in
      guard let first = connection.header() else { return }
      if first.address == FakePeer.bufferAddress {
        guard connection.header() != nil else { return }
        let refusal = FakeConnection.frame(TCPWire.statusRejected)
        let answer = FakeConnection.frame(TCPWire.statusOK) + [1, 2, 3, 4]
        connection.send(answer + refusal.prefix(cut))
        usleep(20_000)
        // If taken for an answer, these would complete the request.
        connection.send(refusal.dropFirst(cut) + [9, 9, 9, 9])
      } else {
        connection.sendStatus(TCPWire.statusRejected)
      }
    }
    defer { peer.stop() }
    let engine = try makeEngine { $0.connectionsPerPeer = 1 }
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(8)
    let batch = try engine.start(
      [UInt64(0), 4].map {
        TransferRequest(
          opcode: .read, segment: segment, source: local.address + Int($0),
          targetOffset: FakePeer.bufferAddress + $0, length: 4)
      })
    _ = try engine.wait(batch, timeoutMilliseconds: 5000)
    let statuses = try engine.statuses(batch, count: 2)
    #expect(statuses.map(\.error) == [nil, .notRegistered])
    #expect(local.bytes.prefix(4).elementsEqual([1, 2, 3, 4]) && local.areGuardsIntact)
    try engine.freeBatch(batch)
  }

  @Test func extraBytes() throws {
    let peer = try FakePeer { connection in
      while connection.serveOne(reading: 0x33) {
        connection.send([UInt8](repeating: 0x44, count: 100))
      }
    }
    defer { peer.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(4096)
    for round in 0..<10 {
      local.fill(0)
      try engine.transfer([
        TransferRequest(
          opcode: .read, segment: segment, source: local.address,
          targetOffset: FakePeer.bufferAddress, length: 4096)
      ])
      #expect(local.holdsOnly(0x33), "round \(round)")
      local.fill(0xCC)
      usleep(2000)
      #expect(local.holdsOnly(0xCC), "round \(round): bytes that nobody asked for landed")
    }
    #expect(local.areGuardsIntact)
  }

  /// Bytes before any request.
  @Test func talksFirst() throws {
    let error = try Self.outcome(timeout: 10_000) { connection in
      connection.send([UInt8](repeating: 0x55, count: 64))
      connection.awaitClose()
    }
    #expect(error?.code == .protocolViolation)
  }

  /// A descriptor may be outdated: it offers version 2, but the peer speaks version 1.
  @Test func staleVersion() throws {
    let peer = try FakePeer { connection in
      while connection.serveOne(reading: 0x66, framed: false) {}
    }
    defer { peer.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    peer.publish(version: 0)
    let local = GuardedMemory(4096)
    try engine.transfer([
      TransferRequest(
        opcode: .read, segment: segment, source: local.address,
        targetOffset: FakePeer.bufferAddress, length: 4096)
    ])
    #expect(local.holdsOnly(0x66))
  }
}

/// Targets that speak the framing without acknowledgments.
struct VersionOneTests {
  /// Servers up to 0.3.9 close after each request; later ones do not.
  @Test(arguments: [true, false])
  func readsAndWrites(_ closesAfterEach: Bool) throws {
    let written = Box(0)
    let peer = try FakePeer(version: 0) { connection in
      while let header = connection.header() {
        if header.isAcknowledged { return }
        if header.opcode == .write {
          guard let data = connection.receive(Int(header.size)) else { return }
          if data.allSatisfy({ $0 == 0x12 }) { written.update { $0 += data.count } }
        } else {
          connection.send([UInt8](repeating: 0x77, count: Int(header.size)))
        }
        if closesAfterEach { return }
      }
    }
    defer { peer.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(40 * 5000)
    local.fill(0x12)
    func requests(_ opcode: Opcode) -> [TransferRequest] {
      (0..<40).map { index in
        TransferRequest(
          opcode: opcode, segment: segment, source: local.address + index * 5000,
          targetOffset: FakePeer.bufferAddress + UInt64(index * 5000), length: 5000)
      }
    }
    try engine.transfer(requests(.write))
    // Terminal means stored: the peer's close acknowledges it.
    #expect(written.value == 40 * 5000)
    try engine.transfer(requests(.read))
    #expect(local.holdsOnly(0x77) && local.areGuardsIntact)
  }

  @Test func closesInsteadOfAnswering() throws {
    let peer = try FakePeer(version: 1) { connection in _ = connection.header() }
    defer { peer.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(4096)
    let code = failureCode { () throws(MooncakeError) in
      try engine.transfer([
        TransferRequest(
          opcode: .read, segment: segment, source: local.address,
          targetOffset: FakePeer.bufferAddress, length: 4096)
      ])
    }
    #expect(code == .unreachable)
  }
}
