import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Many peers with large answers on one loop: slow, silent, refusing and closing ones side by side.
@Suite struct MixedPeersTests {
  private static let count = 1 << 20
  private static let silence: UInt64 = 4000

  /// In pieces that match no buffer, with pauses.
  private static func slow(_ byte: UInt8) -> FakePeer.Script {
    { connection in
      while connection.header() != nil {
        connection.sendStatus()
        var left = count
        while left > 0 {
          sleepBriefly(nanoseconds: 2_000_000)
          let part = min(left, 65_521)
          connection.send([UInt8](repeating: byte, count: part))
          left -= part
        }
      }
    }
  }

  private static func ending(after bytes: [UInt8]) -> FakePeer.Script {
    { connection in
      if connection.header() != nil { connection.send(bytes) }
    }
  }

  private static func silent(after bytes: [UInt8]) -> FakePeer.Script {
    { connection in
      guard connection.header() != nil else { return }
      connection.send(bytes)
      connection.awaitClose()
    }
  }

  @Test func eachEndsInItsOwnWay() throws {
    let start = FakeConnection.frame(TCPWire.statusOK) + [UInt8](repeating: 1, count: 300_000)
    let refusal = FakeConnection.frame(TCPWire.statusRejected)
    var cases: [(script: FakePeer.Script, code: MooncakeError.Code?)] = [
      (Self.silent(after: []), .timeout), (Self.silent(after: start), .timeout),
      (Self.ending(after: refusal), .notRegistered), (Self.ending(after: start), .unreachable),
    ]
    for index in 0..<8 { cases.append((Self.slow(UInt8(0x20 + index)), nil)) }
    let peers = try cases.map { try FakePeer(script: $0.script) }
    defer { for peer in peers { peer.stop() } }
    let engine = try makeEngine { $0.ioThreads = 1 }
    defer { engine.close() }
    let memory = cases.map { _ in GuardedMemory(Self.count) }
    var batches: [BatchID] = []
    for (peer, local) in zip(peers, memory) {
      let batch = try engine.createBatch(capacity: 1)
      try engine.submit(
        batch,
        [
          TransferRequest(
            opcode: .read, segment: try engine.openSegment(peer.name), source: local.address,
            targetOffset: FakePeer.bufferAddress, length: UInt64(Self.count))
        ], timeoutMilliseconds: Self.silence)
      batches.append(batch)
    }
    for index in cases.indices.reversed() {
      let milliseconds = try elapsedMilliseconds {
        let status = try engine.wait(batches[index], timeoutMilliseconds: 20_000)
        #expect(status.error == cases[index].code, "peer \(index)")
      }
      if cases[index].code != .timeout {
        #expect(milliseconds < Self.silence, "peer \(index) waited for another")
      }
      #expect(memory[index].areGuardsIntact)
      if cases[index].code == nil { #expect(memory[index].holdsOnly(UInt8(0x20 + index - 4))) }
      try engine.freeBatch(batches[index])
    }
  }
}
