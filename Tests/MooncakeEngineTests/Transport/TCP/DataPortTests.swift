import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Input of the data port: valid requests in odd pieces, and everything else.
struct DataPortTests {
  private static func withServer(
    _ memory: GuardedMemory, access: Access = [.remoteRead, .remoteWrite],
    _ body: (TransferEngine) throws -> Void
  ) throws {
    let engine = try makeEngine()
    defer { engine.close() }
    try engine.register(memory.address, length: UInt64(memory.count), access: access)
    try body(engine)
    try expectHealthy(engine, memory)
  }

  /// A valid request is still answered.
  private static func expectHealthy(_ engine: TransferEngine, _ memory: GuardedMemory) throws {
    #expect(memory.areGuardsIntact)
    let answer = try exchange(engine, wireHeader(.read, memory, count: 4))
    #expect(answer == FakeConnection.frame(TCPWire.statusOK) + memory.bytes.prefix(4))
  }

  /// Everything that the server answers to these bytes, until it closes.
  private static func exchange(
    _ engine: TransferEngine, _ bytes: [UInt8], closes: Bool = true
  ) throws -> [UInt8] {
    let connection = try RPCTestPeer(to: engine.tcp!.server.address)
    do { try connection.send(bytes) } catch let error as Errno {
      // A refusal may reset the connection while the rest is being sent.
      guard error.rawValue == ECONNRESET || error.rawValue == EPIPE else { throw error }
    }
    if closes { connection.socket.shutdownWrite() }
    return try connection.receiveAll()
  }

  private static let ok = FakeConnection.frame(TCPWire.statusOK)
  private static let rejected = FakeConnection.frame(TCPWire.statusRejected)

  /// Requests sent before a half-close are served before the server closes.
  @Test func pipelinedRequests() throws {
    let memory = GuardedMemory(1 << 20)
    memory.fill(Pattern(seed: 1))
    try Self.withServer(memory) { engine in
      var bytes: [UInt8] = []
      var expected: [UInt8] = []
      for index in 0..<100 {
        let address = memory.address + index * 1000
        bytes += wireHeader(.read, address: UInt64(UInt(bitPattern: address)), size: 1000)
        expected += Self.ok + UnsafeRawBufferPointer(start: address, count: 1000)
      }
      let target = memory.address + 500_000
      bytes += wireHeader(.write, address: UInt64(UInt(bitPattern: target)), size: 3000)
      bytes += [UInt8](repeating: 0x42, count: 3000)
      expected += Self.ok
      let answer = try Self.exchange(engine, bytes)
      #expect(answer == expected)
      #expect(UnsafeRawBufferPointer(start: target, count: 3000).allSatisfy { $0 == 0x42 })
    }
  }

  /// A peer that always has another answer pending: memory for sent answers is released all the
  /// same. For more requests, set MOONCAKE_STRESS_REQUESTS.
  @Test func aConnectionThatIsNeverDrained() throws {
    let size = 4096
    let total = Environment["MOONCAKE_STRESS_REQUESTS"].flatMap { Int($0) } ?? 300_000
    let process = try PeerProcess.serving(byteCount: 1 << 20)
    defer { process.kill() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(process.name)
    let port = try engine.descriptor(of: segment).tcpDataPort
    let peer = try RPCTestPeer(to: #require(SocketAddress(numeric: "127.0.0.1", port: port)))
    let header = wireHeader(.read, address: process.address, size: UInt64(size))
    let answerBytes = size + TCPWire.statusBytes
    // The sockets hold less than half of this, so the rest waits in the server.
    let backlog = 900
    try peer.socket.set(SOL_SOCKET, SO_RCVBUF, 64 << 10)
    let headers = [UInt8]((0..<100).map { _ in header }.joined())
    let chunk = UnsafeMutableRawBufferPointer.allocate(
      byteCount: 100 * answerBytes, alignment: 8)
    defer { chunk.deallocate() }
    var asked = 0
    var received = 0
    var before = 0
    while asked < total {
      while asked * answerBytes - received < backlog * answerBytes {
        try peer.send(headers)
        asked += 100
      }
      guard let count = try peer.socket.tryReceive(into: chunk) else {
        try peer.socket.wait(for: POLLIN, until: .after(milliseconds: 10_000))
        continue
      }
      try #require(count > 0)
      received += count
      if before == 0 && asked >= total / 10 { before = process.residentBytes() }
    }
    let growth = process.residentBytes() - before
    print("never drained: \(total) requests, the server grew by \(growth >> 10) KiB")
    #expect(before > 0 && growth < 2 << 20, "\(growth) bytes")
  }

  /// Both framings on one connection, alternating.
  @Test func mixedFramings() throws {
    let memory = GuardedMemory(4096)
    memory.fill(Pattern(seed: 1))
    try Self.withServer(memory) { engine in
      // Requests in flight have no order among each other, so each has its own place.
      func header(_ opcode: Opcode, _ isAcknowledged: Bool, at offset: Int) -> [UInt8] {
        wireHeader(
          opcode, address: UInt64(UInt(bitPattern: memory.address + offset)), size: 8,
          isAcknowledged: isAcknowledged)
      }
      let first = Array(memory.bytes.prefix(8))
      let data = [UInt8](repeating: 9, count: 8)
      let answer = try Self.exchange(
        engine,
        header(.read, false, at: 0) + header(.read, true, at: 0)
          + header(.write, false, at: 100) + data + header(.write, true, at: 200) + data
          + header(.read, false, at: 100) + header(.read, true, at: 200))
      #expect(answer == first + Self.ok + first + Self.ok + data + Self.ok + data)
    }
  }

  /// Requests that come byte by byte.
  @Test func trickle() throws {
    let memory = GuardedMemory(64)
    try Self.withServer(memory) { engine in
      let connection = try RPCTestPeer(to: engine.tcp!.server.address)
      connection.socket.setNoDelay()
      let bytes =
        wireHeader(.write, memory, count: 20) + (1...20).map { UInt8($0) }
        + wireHeader(.read, memory, count: 20)
      for byte in bytes {
        try connection.send([byte])
        usleep(200)
      }
      connection.socket.shutdownWrite()
      #expect(try connection.receiveAll() == Self.ok + Self.ok + (1...20).map { UInt8($0) })
    }
  }

  /// Ranges not entirely inside one buffer, with either framing.
  @Test func foreignRanges() throws {
    let memory = GuardedMemory(8192)
    memory.fill(0x21)
    try Self.withServer(memory) { engine in
      let start = UInt64(UInt(bitPattern: memory.address))
      let ranges: [(UInt64, UInt64)] = [
        (0, 8), (start - 1, 8), (start, 8193), (start + 8185, 8), (start + 8192, 1), (start, 0),
        (start, .max), (.max, 1), (.max, .max), (start, 0 &- start), (start, 1 &- start),
        (0 &- 8, 16), (start, 1 << 63), (1 << 63, 8), (8, start),
      ]
      for (address, size) in ranges {
        for opcode in [Opcode.read, .write] {
          let data = [UInt8](repeating: 0xEE, count: 64)
          let answer = try Self.exchange(
            engine, wireHeader(opcode, address: address, size: size) + data)
          #expect(answer == Self.rejected, "\(opcode) of \(size) bytes at \(address)")
          let silent = try Self.exchange(
            engine, wireHeader(opcode, address: address, size: size, isAcknowledged: false) + data)
          #expect(silent.isEmpty, "\(opcode) of \(size) bytes at \(address)")
        }
      }
      #expect(memory.holdsOnly(0x21))
    }
  }

  @Test func rightsAreCheckedByTheTarget() throws {
    let readable = GuardedMemory(64)
    let writable = GuardedMemory(64)
    try Self.withServer(readable, access: .remoteRead) { engine in
      try engine.register(writable.address, length: 64, access: .remoteWrite)
      let data = [UInt8](repeating: 0xEE, count: 8)
      let written = try Self.exchange(engine, wireHeader(.write, readable, count: 8) + data)
      #expect(written == Self.rejected)
      let read = try Self.exchange(engine, wireHeader(.read, writable, count: 8))
      #expect(read == Self.rejected)
      #expect(readable.holdsOnly(0))
    }
  }

  /// Opcodes other than write are reads, as peers of every version treat them.
  @Test func otherOpcodes() throws {
    let memory = GuardedMemory(64)
    memory.fill(0x21)
    try Self.withServer(memory) { engine in
      for code: UInt8 in [0, 2, 7, 0x7F, 0x80, 0x82, 0xFF] {
        var bytes = wireHeader(.read, memory, count: 5)
        bytes[16] = code
        for index in 17..<24 { bytes[index] = 0xAB }
        let frame = code & 0x80 == 0 ? [] : Self.ok
        let answer = try Self.exchange(engine, bytes)
        #expect(answer == frame + [UInt8](repeating: 0x21, count: 5))
      }
    }
  }

  /// Connections that stop at any point.
  @Test func partialRequests() throws {
    let memory = GuardedMemory(4096)
    try Self.withServer(memory) { engine in
      let whole = wireHeader(.write, memory, count: 4096) + [UInt8](repeating: 0x31, count: 4096)
      for count in Array(0..<24) + [24, 25, 100, 4000, 24 + 4095] {
        let answer = try Self.exchange(engine, Array(whole.prefix(count)))
        #expect(answer.isEmpty, "\(count) bytes")
      }
      let answer = try Self.exchange(engine, whole)
      #expect(answer == Self.ok)
    }
  }

  @Test func garbage() throws {
    let memory = GuardedMemory(4096)
    memory.fill(0x21)
    try Self.withServer(memory) { engine in
      var generator = SeededRandom(seed: 77)
      for _ in 0..<400 {
        let count = Int.random(in: 1...2000, using: &generator)
        let bytes = (0..<count).map { _ in UInt8.random(in: 0...255, using: &generator) }
        _ = try Self.exchange(engine, bytes)
      }
      #expect(memory.holdsOnly(0x21))
    }
  }

  /// Thousands of connections that begin something and vanish; those that stay open cost nothing.
  @Test func floodOfConnections() throws {
    let memory = GuardedMemory(4096)
    memory.fill(0x21)
    try Self.withServer(memory) { engine in
      let half = Array(wireHeader(.write, memory, count: 4096).prefix(13))
      for round in 0..<20 {
        var open: [Holder] = []
        for index in 0..<100 {
          let holder = Holder(try RPCTestPeer(to: engine.tcp!.server.address))
          if index % 3 == 0 { try holder.connection.send(half) }
          if index % 3 == 1 { try holder.connection.send([UInt8](repeating: 0xFF, count: 24)) }
          open.append(holder)
        }
        if round % 5 == 0 { try Self.expectHealthy(engine, memory) }
      }
      #expect(memory.holdsOnly(0x21))
      #expect(
        eventually { engine.tcp!.counters.connections.load(ordering: .relaxed) == 0 })
    }
  }

  private final class Holder {
    let connection: RPCTestPeer
    init(_ connection: consuming RPCTestPeer) { self.connection = connection }
  }

  /// A peer that requests much and receives nothing occupies one connection and little memory.
  @Test func readersThatTakeNothing() throws {
    let memory = GuardedMemory(8 << 20)
    memory.fill(0x21)
    try Self.withServer(memory) { engine in
      let connection = try RPCTestPeer(to: engine.tcp!.server.address)
      let request = wireHeader(.read, memory, count: memory.count)
      // The server stops reading requests once enough answers are waiting.
      var accepted = 0
      let bytes = (0..<256).flatMap { _ in request }
      let deadline = Deadline.after(milliseconds: 300)
      while !deadline.hasPassed {
        if let count = try connection.socket.trySend(bytes, from: 0) {
          accepted += count
        } else {
          usleep(5000)
        }
      }
      #expect(accepted < 64 << 20)
      try Self.expectHealthy(engine, memory)
    }
  }
}
