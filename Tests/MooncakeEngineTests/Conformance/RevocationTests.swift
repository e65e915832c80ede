import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Once `unregister` has returned, no byte of the memory moves, even if a copy was in progress.
struct RevocationTests {
  private static let byteCount = 4 << 20

  @Test(arguments: TransportKind.allCases)
  func readers(_ kind: TransportKind) throws {
    let memory = GuardedMemory(Self.byteCount)
    try withPair(kind) { pair in
      for round in 0..<6 {
        memory.fill(0x01)
        try pair.target.register(
          memory.address, length: UInt64(Self.byteCount), access: .remoteRead)
        let complaints = Complaints()
        let completed = Atomic<Int>(0)
        let reader = try WorkerThread.start(name: "reader") {
          let local = GuardedMemory(Self.byteCount)
          let end = Deadline.after(milliseconds: 20_000)
          while !end.hasPassed {
            local.fill(0x00)
            let code = failureCode { () throws(MooncakeError) in
              try pair.initiator.transfer(
                [pair.read(into: local.address, from: memory.address, Self.byteCount)],
                timeoutMilliseconds: 10_000)
            }
            complaints.require(local.lacks(0xEE), "bytes of revoked memory arrived")
            if code == nil {
              complaints.require(local.holdsOnly(0x01), "a completed read is not whole")
              completed.add(1, ordering: .relaxed)
              continue
            }
            complaints.require(code == .notRegistered, "the read failed with \(code!)")
            return
          }
          complaints.add("reads go on after unregister")
        }
        _ = eventually { completed.load(ordering: .relaxed) > 0 }
        usleep(UInt32(round) * 700)
        try pair.target.unregister(memory.address)
        memory.fill(0xEE)
        reader.join()
        #expect(complaints.all.isEmpty, "\(complaints.all)")
      }
    }
  }

  @Test(arguments: TransportKind.allCases)
  func writers(_ kind: TransportKind) throws {
    let memory = GuardedMemory(Self.byteCount)
    try withPair(kind) { pair in
      for round in 0..<6 {
        try pair.target.register(
          memory.address, length: UInt64(Self.byteCount), access: .remoteWrite)
        let complaints = Complaints()
        let completed = Atomic<Int>(0)
        let writer = try WorkerThread.start(name: "writer") {
          let local = GuardedMemory(Self.byteCount)
          local.fill(0x02)
          let end = Deadline.after(milliseconds: 20_000)
          while !end.hasPassed {
            let code = failureCode { () throws(MooncakeError) in
              try pair.initiator.transfer(
                [pair.write(from: local.address, to: memory.address, Self.byteCount)],
                timeoutMilliseconds: 10_000)
            }
            completed.add(1, ordering: .relaxed)
            if code == nil { continue }
            complaints.require(code == .notRegistered, "the write failed with \(code!)")
            return
          }
          complaints.add("writes go on after unregister")
        }
        _ = eventually { completed.load(ordering: .relaxed) > 0 }
        usleep(UInt32(round) * 700)
        try pair.target.unregister(memory.address)
        memory.fill(0xEE)
        writer.join()
        #expect(complaints.all.isEmpty, "\(complaints.all)")
        #expect(memory.holdsOnly(0xEE), "a write landed in revoked memory")
      }
      #expect(memory.areGuardsIntact)
    }
  }

  /// A writer that stops in the middle of its data does not keep the memory.
  @Test func aSilentWriterIsCutOff() throws {
    let memory = GuardedMemory(64 << 10)
    let engine = try makeEngine()
    defer { engine.close() }
    try engine.register(memory.address, length: 64 << 10, access: .remoteWrite)
    let connection = try RPCTestPeer(to: engine.tcp!.server.address)
    try connection.send(
      wireHeader(.write, memory, count: 64 << 10) + [UInt8](repeating: 0x03, count: 1000))
    #expect(eventually { memory.bytes[999] == 0x03 })
    let milliseconds = try elapsedMilliseconds { try engine.unregister(memory.address) }
    #expect(milliseconds < 1000)
    memory.fill(0xEE)
    // The peer may not notice at once: what it still sends is discarded.
    try? connection.send([UInt8](repeating: 0x03, count: 4096))
    _ = try connection.receiveAll()
    #expect(memory.holdsOnly(0xEE))
  }

  /// A reader that takes nothing blocks neither the memory nor `unregister`.
  @Test func aSilentReaderIsCutOff() throws {
    let memory = GuardedMemory(32 << 20)
    let engine = try makeEngine()
    defer { engine.close() }
    try engine.register(memory.address, length: UInt64(memory.count), access: .remoteRead)
    let connection = try RPCTestPeer(to: engine.tcp!.server.address)
    try connection.send(wireHeader(.read, memory, count: memory.count))
    usleep(50_000)
    let milliseconds = try elapsedMilliseconds { try engine.unregister(memory.address) }
    #expect(milliseconds < 1000)
    memory.fill(0xEE)
    let received = try connection.receiveAll()
    #expect(received.count < memory.count && !received.dropFirst(8).contains(0xEE))
  }
}

/// An encoded request of version 2.
func wireHeader(_ opcode: Opcode, _ memory: GuardedMemory, count: Int) -> [UInt8] {
  wireHeader(opcode, address: UInt64(UInt(bitPattern: memory.address)), size: UInt64(count))
}

func wireHeader(
  _ opcode: Opcode, address: UInt64, size: UInt64, isAcknowledged: Bool = true
) -> [UInt8] {
  var bytes = [UInt8](repeating: 0, count: TCPWire.headerBytes)
  bytes.withUnsafeMutableBytes {
    TCPWire.Header(size: size, address: address, opcode: opcode, isAcknowledged: isAcknowledged)
      .write(to: $0.baseAddress!)
  }
  return bytes
}
