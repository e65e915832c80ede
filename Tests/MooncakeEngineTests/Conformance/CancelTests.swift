import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Canceled requests end soon, report it, and no longer touch their memory.
struct CancelTests {
  /// A peer process, its open segment, and local memory as large as the peer's.
  private struct Setting {
    let peer: PeerProcess
    let engine: TransferEngine
    let segment: SegmentID
    let local: GuardedMemory

    /// A read from an offset in the peer's memory.
    func read(_ offset: UInt64, _ count: Int, to localOffset: Int) -> TransferRequest {
      TransferRequest(
        opcode: .read, segment: segment, source: local.address + localOffset,
        targetOffset: peer.address + offset, length: UInt64(count))
    }
  }

  private func withStoppablePeer(
    _ kind: TransportKind, _ byteCount: Int, _ body: (Setting) throws -> Void
  ) throws {
    let peer = try PeerProcess.serving(byteCount: byteCount)
    defer { peer.kill() }
    let engine = try makeEngine(kind)
    defer { engine.close() }
    try body(
      Setting(
        peer: peer, engine: engine, segment: try engine.openSegment(peer.name),
        local: GuardedMemory(byteCount)))
  }

  @Test(arguments: TransportKind.needingThePeer)
  func aStoppedPeer(_ kind: TransportKind) throws {
    try withStoppablePeer(kind, 8 << 20, checkAStoppedPeer)
  }

  private func checkAStoppedPeer(_ pair: Setting) throws {
    let (peer, engine, local) = (pair.peer, pair.engine, pair.local)
    func request(_ offset: Int, _ count: Int) -> TransferRequest {
      pair.read(UInt64(offset), count, to: offset)
    }
    try engine.transfer([request(0, 4096)])
    peer.stop()
    // Small ones, a striped one, and more than one connection has in flight.
    let requests = [request(0, 8 << 20)] + (0..<1500).map { request($0 * 4096, 4096) }
    let batch = try engine.start(requests)
    usleep(20_000)
    #expect(try engine.poll(batch).state == .waiting)
    let milliseconds = try elapsedMilliseconds {
      try engine.cancel(batch)
      let status = try engine.wait(batch, timeoutMilliseconds: 10_000)
      #expect(status.state == .canceled && status.error == .canceled)
      #expect(status.terminalCount == UInt64(requests.count))
    }
    #expect(milliseconds < 1000)
    for status in try engine.statuses(batch, count: requests.count) {
      #expect(status.state == .canceled || status.state == .completed)
    }
    try engine.freeBatch(batch)

    local.fill(0xCC)
    peer.resume()
    usleep(200_000)
    #expect(local.holdsOnly(0xCC), "an answer landed after its request was canceled")
    try engine.transfer([request(0, 8 << 20)])
    #expect(local.holdsOnly(PeerProcess.fillByte))
  }

  /// A request outside the known buffers waits for the peer's answer about them, which never comes
  /// from a stopped peer.
  @Test(arguments: TransportKind.needingThePeer)
  func whileTheDescriptorIsFetched(_ kind: TransportKind) throws {
    try withStoppablePeer(kind, 4096, checkWhileTheDescriptorIsFetched)
  }

  private func checkWhileTheDescriptorIsFetched(_ pair: Setting) throws {
    let (peer, engine, local) = (pair.peer, pair.engine, pair.local)
    peer.stop()
    // The second one waits behind the question for the first.
    let batches = try [1 << 30, 1 << 31].map { try engine.start([pair.read($0, 4096, to: 0)]) }
    usleep(50_000)
    for batch in batches.reversed() {
      let milliseconds = try elapsedMilliseconds {
        try engine.cancel(batch)
        #expect(try engine.wait(batch, timeoutMilliseconds: 10_000).state == .canceled)
      }
      #expect(milliseconds < 500, "\(milliseconds) ms")
      try engine.freeBatch(batch)
    }
    peer.resume()
    // The answer comes when nobody waits for it any more.
    local.fill(0)
    try engine.transfer([pair.read(0, 4096, to: 0)])
    #expect(local.holdsOnly(PeerProcess.fillByte))
  }

  @Test(arguments: TransportKind.allCases)
  func racingCompletion(_ kind: TransportKind) throws {
    let count = 32
    // Smaller copies have ended when the submit returns.
    let size = kind == .sharedMemory ? 256 << 10 : 16 << 10
    let memory = GuardedMemory(count * size)
    memory.fill(0x01)
    let local = GuardedMemory(count * size)
    var outcomes: Set<TransferState> = []
    try withPair(kind, registering: memory) { pair in
      let initiator = pair.initiator
      for round in 0..<200 {
        local.fill(0x00)
        let batch = try initiator.start(
          (0..<count).map { index in
            pair.read(into: local.address + index * size, from: memory.address + index * size, size)
          })
        let end = Clock.now() + UInt64(round * 5000)
        while Clock.now() < end {}
        try initiator.cancel(batch)
        let status = try initiator.wait(batch, timeoutMilliseconds: 10_000)
        let statuses = try initiator.statuses(batch, count: count)
        var completed = 0
        for (index, one) in statuses.enumerated() {
          #expect(one.state == .completed || one.state == .canceled)
          #expect((one.state == .completed) == (one.error == nil))
          guard one.state == .completed else { continue }
          completed += 1
          let bytes = UnsafeRawBufferPointer(start: local.address + index * size, count: size)
          #expect(bytes.first == 0x01 && bytes.last == 0x01, "round \(round), request \(index)")
        }
        #expect(status.state == (completed == count ? .completed : .canceled))
        #expect(status.completedCount == UInt64(completed) && status.terminalCount == UInt64(count))
        #expect(status.transferredBytes == UInt64(completed * size))
        outcomes.insert(status.state)
        try initiator.freeBatch(batch)
        local.fill(0xCC)
        if round % 10 == 0 { usleep(2000) }
        #expect(local.holdsOnly(0xCC), "round \(round): a byte landed after the end")
      }
      try initiator.transfer([pair.read(into: local.address, from: memory.address, size)])
    }
    #expect(outcomes == [.completed, .canceled], "the race was always won by one side")
    #expect(local.areGuardsIntact)
  }

  /// Cancels from another thread while the requests are being queued.
  @Test(arguments: TransportKind.needingThePeer)
  func racingSubmit(_ kind: TransportKind) throws {
    try withStoppablePeer(kind, 1 << 20, checkRacingSubmit)
  }

  private func checkRacingSubmit(_ pair: Setting) throws {
    let (peer, engine) = (pair.peer, pair.engine)
    peer.stop()
    let requests = (0..<256).map { pair.read(UInt64($0 * 4096), 4096, to: $0 * 4096) }
    for round in 0..<30 {
      let batch = try engine.createBatch(capacity: 256)
      let canceler = try WorkerThread.start(name: "cancel") {
        // The first sign that the requests exist.
        while let status = try? engine.poll(batch), status.submittedCount == 0 {}
        try? engine.cancel(batch)
      }
      try engine.submit(batch, requests, timeoutMilliseconds: 5000)
      canceler.join()
      let milliseconds = try elapsedMilliseconds {
        let status = try engine.wait(batch, timeoutMilliseconds: 10_000)
        #expect(status.state == .canceled, "round \(round)")
      }
      #expect(milliseconds < 1000, "round \(round): the cancel was lost")
      try engine.freeBatch(batch)
    }
  }

  /// Requests that end early do not harm those behind them on the connection: an answer is never
  /// taken for another request's.
  @Test(arguments: [true, false])
  func neighborsOnOneConnection(_ cancels: Bool) throws {
    let isReleased = Box(false)
    let peer = try FakePeer { connection in
      while let header = connection.header() {
        _ = eventually(within: 10_000) { isReleased.value }
        // The requested address decides the bytes.
        let byte = UInt8((header.address - FakePeer.bufferAddress) >> 16) + 1
        connection.sendStatus()
        connection.send([UInt8](repeating: byte, count: Int(header.size)))
      }
    }
    defer { peer.stop() }
    let engine = try makeEngine { $0.connectionsPerPeer = 1 }
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(4 << 16)
    let batches = try (0..<4).map { index in
      try engine.start(
        [
          TransferRequest(
            opcode: .read, segment: segment, source: local.address + (index << 16),
            targetOffset: FakePeer.bufferAddress + UInt64(index << 16), length: 1 << 16)
        ], timeoutMilliseconds: !cancels && index % 2 == 0 ? 150 : 10_000)
    }
    usleep(50_000)
    for index in [0, 2] {
      if cancels { try engine.cancel(batches[index]) }
      let status = try engine.wait(batches[index], timeoutMilliseconds: 3000)
      #expect(status.state == (cancels ? .canceled : .timeout), "batch \(index)")
    }
    local.fill(0xCC)
    isReleased.value = true
    for (index, batch) in batches.enumerated() {
      let status = try engine.wait(batch, timeoutMilliseconds: 10_000)
      #expect((status.state == .completed) == (index % 2 == 1), "batch \(index)")
      let part = UnsafeRawBufferPointer(start: local.address + (index << 16), count: 1 << 16)
      let byte = index % 2 == 1 ? UInt8(index) + 1 : 0xCC
      #expect(part.first == byte && memcmp(part.baseAddress!, part.baseAddress! + 1, 65_535) == 0)
      try engine.freeBatch(batch)
    }
    #expect(local.areGuardsIntact)
  }

  /// Canceling batches that are finished, empty or freed.
  @Test(arguments: TransportKind.allCases)
  func nothingToCancel(_ kind: TransportKind) throws {
    let memory = GuardedMemory(4096)
    try withPair(kind, registering: memory) { pair in
      let initiator = pair.initiator
      let empty = try initiator.createBatch(capacity: 1)
      try initiator.cancel(empty)
      let local = GuardedMemory(4096)
      try initiator.submit(empty, [pair.read(into: local.address, from: memory.address, 4096)])
      #expect(try initiator.wait(empty, timeoutMilliseconds: 5000).state == .completed)
      try initiator.cancel(empty)
      #expect(try initiator.poll(empty).state == .completed)
      try initiator.freeBatch(empty)
      #expect(
        failureCode { () throws(MooncakeError) in try initiator.cancel(empty) } == .invalidHandle)
    }
  }
}
