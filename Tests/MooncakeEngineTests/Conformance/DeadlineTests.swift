import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Peers that are stopped, killed, silent or absent: every request ends by its deadline.
struct DeadlineTests {
  @Test(arguments: TransportKind.needingThePeer, [Opcode.read, .write])
  func aStoppedPeer(_ kind: TransportKind, _ opcode: Opcode) throws {
    let peer = try PeerProcess.serving(byteCount: 32 << 20)
    defer { peer.kill() }
    let engine = try makeEngine(kind)
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(32 << 20)
    local.fill(0x01)
    peer.stop()
    let request = TransferRequest(
      opcode: opcode, segment: segment, source: local.address, targetOffset: peer.address,
      length: 32 << 20)
    let batch = try engine.start([request], timeoutMilliseconds: 300)
    let milliseconds = try elapsedMilliseconds {
      let status = try engine.wait(batch, timeoutMilliseconds: 10_000)
      #expect(status.state == .timeout && status.error == .timeout)
    }
    #expect((200..<2000).contains(milliseconds), "\(milliseconds) ms")
    #expect(engine.failureMessage(of: batch).contains("deadline"))
    try engine.freeBatch(batch)
    local.fill(0xCC)
    peer.resume()
    usleep(200_000)
    #expect(local.holdsOnly(0xCC), "bytes landed after the request had timed out")
    try engine.transfer([request])
  }

  /// Opening a segment of a stopped peer fails in time.
  @Test(arguments: TransportKind.allCases)
  func openingAStoppedPeer(_ kind: TransportKind) throws {
    let peer = try PeerProcess.serving(byteCount: 4096)
    defer { peer.kill() }
    let engine = try makeEngine(kind)
    defer { engine.close() }
    peer.stop()
    let milliseconds = elapsedMilliseconds {
      let code = failureCode { () throws(MooncakeError) in
        _ = try engine.openSegment(peer.name, timeoutMilliseconds: 300)
      }
      #expect(code == .timeout)
    }
    #expect(milliseconds < 2000)
    peer.resume()
    _ = try engine.openSegment(peer.name, timeoutMilliseconds: 5000)
  }

  @Test(arguments: TransportKind.allCases)
  func aPeerKilledInMidTransfer(_ kind: TransportKind) throws {
    let peer = try PeerProcess.serving(byteCount: 64 << 20)
    let engine = try makeEngine(kind)
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(64 << 20)
    let request = TransferRequest(
      opcode: .read, segment: segment, source: local.address, targetOffset: peer.address,
      length: 64 << 20)
    let batch = try engine.start(
      [TransferRequest](repeating: request, count: 64), timeoutMilliseconds: 15_000)
    _ = eventually { (try? engine.poll(batch).completedCount).map { $0 > 0 } ?? true }
    peer.kill()
    let milliseconds = try elapsedMilliseconds {
      let status = try engine.wait(batch, timeoutMilliseconds: 20_000)
      #expect(status.state == .failed && status.error == .unreachable)
      #expect(status.terminalCount == 64)
    }
    #expect(milliseconds < 8000, "\(milliseconds) ms")
    #expect(engine.failureMessage(of: batch).contains(peer.name))
    try engine.freeBatch(batch)
    local.fill(0xCC)
    usleep(20_000)
    #expect(local.holdsOnly(0xCC))
  }

  /// A new process with the same name and port: later requests work with its addresses.
  @Test(arguments: TransportKind.allCases)
  func aRestartedPeer(_ kind: TransportKind) throws {
    let first = try PeerProcess.serving(byteCount: 1 << 20)
    let engine = try makeEngine(kind)
    defer { engine.close() }
    let segment = try engine.openSegment(first.name)
    let local = GuardedMemory(1 << 20)
    func read(_ peer: PeerProcess) throws(MooncakeError) {
      local.fill(0)
      try engine.transfer([
        TransferRequest(
          opcode: .read, segment: segment, source: local.address, targetOffset: peer.address,
          length: 1 << 20)
      ])
    }
    try read(first)
    let port = UInt16(first.name.split(separator: ":").last!)!
    first.kill()
    let second = try PeerProcess.serving(byteCount: 1 << 20, port: port)
    defer { second.kill() }
    #expect(second.name == first.name)
    #expect(try engine.openSegment(second.name) == segment)
    try read(second)
    #expect(local.holdsOnly(PeerProcess.fillByte))

    // Without opening the segment again: the engine notices by itself.
    second.kill()
    let third = try PeerProcess.serving(byteCount: 1 << 20, port: port)
    defer { third.kill() }
    try read(third)
    #expect(local.holdsOnly(PeerProcess.fillByte))
  }

  /// A request waits for a peer that returns within the deadline.
  @Test func aPeerThatIsAwayForAMoment() throws {
    let first = try PeerProcess.serving(byteCount: 4096)
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(first.name)
    let local = GuardedMemory(4096)
    let port = UInt16(first.name.split(separator: ":").last!)!
    first.kill()
    // The new process's address is not known yet, so this asks for the old one.
    let batch = try engine.start(
      [
        TransferRequest(
          opcode: .read, segment: segment, source: local.address, targetOffset: first.address,
          length: 4096)
      ], timeoutMilliseconds: 10_000)
    usleep(300_000)
    let second = try PeerProcess.serving(byteCount: 4096, port: port)
    defer { second.kill() }
    let status = try engine.wait(batch, timeoutMilliseconds: 15_000)
    // Address layouts are random: either outcome must be reported soon.
    if second.address == first.address {
      #expect(status.state == .completed)
    } else {
      #expect(status.error == .notRegistered)
    }
    try engine.freeBatch(batch)
  }

  @Test func aPeerThatAcceptsAndSaysNothing() throws {
    let peer = try FakePeer { $0.awaitClose() }
    defer { peer.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(4 << 20)
    for opcode in [Opcode.read, .write] {
      for count in [UInt64(16), 4 << 20] {
        let request = TransferRequest(
          opcode: opcode, segment: segment, source: local.address,
          targetOffset: FakePeer.bufferAddress, length: count)
        let milliseconds = elapsedMilliseconds {
          let code = failureCode { () throws(MooncakeError) in
            try engine.transfer([request], timeoutMilliseconds: 200)
          }
          #expect(code == .timeout, "\(opcode) of \(count)")
        }
        #expect((150..<1500).contains(milliseconds), "\(opcode) of \(count): \(milliseconds) ms")
      }
    }
  }

  @Test func aDataPortThatRefuses() throws {
    let name = Box("")
    let unused = try makeListener()
    let port = try unused.localAddress().port
    _ = consume unused
    let listener = try makeListener()
    name.value = try listener.localAddress().description
    let rpc = try RPCServer(
      listener: listener,
      handlers: .init(
        descriptor: {
          SegmentDescriptor(
            name: name.value, tcpDataHost: "127.0.0.1", tcpDataPort: port,
            buffers: [
              RemoteBuffer(address: 4096, length: 4096, access: [.remoteRead, .remoteWrite])
            ]
          ).json()
        }, notify: { _ in nil }))
    defer { rpc.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(name.value)
    let local = GuardedMemory(64)
    let request = TransferRequest(
      opcode: .read, segment: segment, source: local.address, targetOffset: 4096, length: 64)
    func attempt(_ timeout: UInt64) -> (MooncakeError.Code?, UInt64) {
      var code: MooncakeError.Code?
      let milliseconds = elapsedMilliseconds {
        code = failureCode { () throws(MooncakeError) in
          try engine.transfer([request], timeoutMilliseconds: timeout)
        }
      }
      return (code, milliseconds)
    }
    let short = attempt(400)
    #expect(short.0 == .timeout && short.1 < 1500)
    let long = attempt(20_000)
    #expect(long.0 == .unreachable && long.1 < 6000)
    // A request does not wait again for a peer known to be away.
    let next = attempt(20_000)
    #expect(next.0 == .unreachable && next.1 < 1500)
  }

  /// Answers after the deadline have no effect.
  @Test func lateAnswers() throws {
    let isReleased = Box(false)
    let peer = try FakePeer { connection in
      guard let header = connection.header() else { return }
      _ = eventually { isReleased.value }
      connection.sendStatus()
      connection.send([UInt8](repeating: 0xEE, count: Int(header.size)))
      connection.awaitClose()
    }
    defer { peer.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(256 << 10)
    let code = failureCode { () throws(MooncakeError) in
      try engine.transfer(
        [
          TransferRequest(
            opcode: .read, segment: segment, source: local.address,
            targetOffset: FakePeer.bufferAddress, length: 256 << 10)
        ], timeoutMilliseconds: 100)
    }
    #expect(code == .timeout)
    local.fill(0xCC)
    isReleased.value = true
    usleep(100_000)
    #expect(local.holdsOnly(0xCC))
  }
}
