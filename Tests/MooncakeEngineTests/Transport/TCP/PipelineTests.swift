import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Long queues on connections: requests behind a full window or a suspect one must still move, and
/// waiting must not burn processor time.
struct PipelineTests {
  /// More requests than a connection has in flight, on more connections than a driver tries without
  /// asking epoll.
  @Test func deepQueuesOnManyConnections() throws {
    let target = try makeEngine()
    defer { target.close() }
    let memory = GuardedMemory(1 << 20)
    memory.fill(Pattern(seed: 3))
    try target.register(memory.address, length: UInt64(memory.count), access: .remoteRead)
    let initiator = try makeEngine {
      $0.connectionsPerPeer = 4
      $0.ioThreads = 1
    }
    defer { initiator.close() }
    let segment = try initiator.openSegment(target.name)
    let size = 64
    let count = memory.count / size
    let locals = (0..<8).map { _ in GuardedMemory(memory.count) }
    let batches = try locals.map { local in
      try initiator.start(
        (0..<count).map { index in
          TransferRequest(
            opcode: .read, segment: segment, source: local.address + index * size,
            targetOffset: UInt64(UInt(bitPattern: memory.address)) + UInt64(index * size),
            length: UInt64(size))
        }, timeoutMilliseconds: 10_000)
    }
    for (batch, local) in zip(batches, locals) {
      let status = try initiator.wait(batch, timeoutMilliseconds: 15_000)
      #expect(status.state == .completed && status.completedCount == UInt64(count))
      #expect(local.matches(Pattern(seed: 3)) && local.areGuardsIntact)
    }
  }

  /// Requests that failed on three connections are sent alone, with nothing behind them.
  @Test func suspectsGoAlone() throws {
    let company = Box(0)
    let served = Box(0)
    let peer = try FakePeer { connection in
      if connection.index < 3 {
        for _ in 0..<3 where connection.header() == nil { return }
        return
      }
      while let header = connection.header() {
        if served.value < 3 && connection.hasMore(within: 60) { company.update { $0 += 1 } }
        served.update { $0 += 1 }
        connection.sendStatus()
        connection.send([UInt8](repeating: 1, count: Int(header.size)))
      }
    }
    defer { peer.stop() }
    let engine = try makeEngine { $0.connectionsPerPeer = 1 }
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(64)
    let requests = (0..<3).map { index in
      TransferRequest(
        opcode: .read, segment: segment, source: local.address + index * 8,
        targetOffset: FakePeer.bufferAddress + UInt64(index * 8), length: 8)
    }
    let suspects = try engine.start(requests, timeoutMilliseconds: 10_000)
    _ = try #require(peer.connection(3))
    let others = try engine.start(
      requests.map {
        var request = $0
        request.source = request.source! + 32
        return request
      }, timeoutMilliseconds: 10_000)
    for batch in [suspects, others] {
      #expect(try engine.wait(batch, timeoutMilliseconds: 10_000).state == .completed)
    }
    #expect(company.value == 0, "a suspect had company")
    #expect(local.areGuardsIntact)
  }

  /// A thread that waits while a suspect is in flight must sleep, though the socket is always
  /// writable.
  @Test func waitingBehindASuspectCostsNothing() throws {
    let peer = try FakePeer { connection in
      if connection.index < 3 {
        for _ in 0..<3 where connection.header() == nil { return }
        return
      }
      _ = connection.header()
      connection.awaitClose()
    }
    defer { peer.stop() }
    let engine = try makeEngine {
      $0.connectionsPerPeer = 1
      $0.ioThreads = 1
    }
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(64)
    let requests = (0..<3).map { index in
      TransferRequest(
        opcode: .read, segment: segment, source: local.address + index * 8,
        targetOffset: FakePeer.bufferAddress + UInt64(index * 8), length: 8)
    }
    // This thread drives the loop from the first connect to the deadline.
    let before = threadMilliseconds()
    let code = failureCode { () throws(MooncakeError) in
      try engine.transfer(requests, timeoutMilliseconds: 1500)
    }
    #expect(code == .timeout && peer.connectionCount >= 4)
    #expect(threadMilliseconds() - before < 300, "the waiter spun")
  }

  private func threadMilliseconds() -> Int {
    var time = timespec()
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
    return time.tv_sec * 1000 + time.tv_nsec / 1_000_000
  }
}
