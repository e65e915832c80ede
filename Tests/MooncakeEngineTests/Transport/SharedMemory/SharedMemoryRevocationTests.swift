import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Unregistered memory: no byte moves afterwards, even if a peer was in the middle of a copy.
struct SharedMemoryRevocationTests {
  private static let byteCount = 4 << 20

  @Test(arguments: MemoryKind.allCases, [Opcode.read, .write])
  func whileAThreadCopies(_ kind: MemoryKind, _ opcode: Opcode) throws {
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    let memory = try RegisteredMemory(kind, pair.target, Self.byteCount)
    let isOver = Atomic<Bool>(false)
    let completed = Atomic<Int>(0)
    let complaints = Complaints()
    let copier = try WorkerThread.start(name: "copier") {
      let local = GuardedMemory(Self.byteCount)
      while !isOver.load(ordering: .relaxed) {
        local.fill(opcode == .read ? 0 : 0x02)
        let code = failureCode { () throws(MooncakeError) in
          try pair.initiator.transfer([
            opcode == .read
              ? pair.read(into: local.address, from: memory.address, Self.byteCount)
              : pair.write(from: local.address, to: memory.address, Self.byteCount)
          ])
        }
        if code == nil { completed.add(1, ordering: .relaxed) }
        complaints.require(code == nil || code == .notRegistered, "failed with \(code!)")
        complaints.require(local.lacks(0xEE), "bytes of revoked memory arrived")
      }
    }
    for round in 0..<30 {
      let before = completed.load(ordering: .relaxed)
      #expect(eventually { completed.load(ordering: .relaxed) > before })
      usleep(UInt32(round * 131 % 1000))
      try pair.target.unregister(memory.address)
      memory.fill(0xEE)
      usleep(300)
      #expect(memory.holdsOnly(0xEE), "round \(round)")
      memory.fill(0x01)
      try pair.target.register(
        memory.address, length: UInt64(Self.byteCount), access: [.remoteRead, .remoteWrite])
    }
    isOver.store(true, ordering: .relaxed)
    copier.join()
    #expect(complaints.all.isEmpty, "\(complaints.all)")
    #expect(pair.initiator.sharedBytes > 0)
  }

  /// Freed while peers read: the owner unmaps its side during the copy.
  @Test func freedWhileAThreadCopies() throws {
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    for _ in 0..<20 {
      let memory = try RegisteredMemory(.mapped, pair.target, 8 << 20, access: .remoteRead)
      let begun = Atomic<Int>(0)
      let complaints = Complaints()
      let reader = try WorkerThread.start(name: "reader") {
        let local = GuardedMemory(8 << 20)
        while true {
          let code = failureCode { () throws(MooncakeError) in
            try pair.initiator.transfer([
              pair.read(into: local.address, from: memory.address, 8 << 20)
            ])
          }
          begun.add(1, ordering: .relaxed)
          if code == nil { continue }
          return complaints.require(code == .notRegistered, "failed with \(code!)")
        }
      }
      #expect(eventually { begun.load(ordering: .relaxed) > 0 })
      try pair.target.free(memory.address)
      reader.join()
      #expect(complaints.all.isEmpty, "\(complaints.all)")
    }
  }

  /// Local memory that becomes unusable during a copy is an error and does not kill the process.
  @Test func localMemoryTakenInMidCopy() throws {
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    let target = try RegisteredMemory(.mapped, pair.target, 32 << 20)
    for round in 0..<20 {
      let local = try RegisteredMemory(.ordinary, pair.initiator, 32 << 20, access: .local)
      let batch = try pair.initiator.start([
        pair.read(into: local.address, from: target.address, 32 << 20)
      ])
      usleep(UInt32(round * 100))
      try pair.initiator.unregister(local.address)
      #expect(mprotect(local.pages, 32 << 20, PROT_NONE) == 0)
      let status = try pair.initiator.wait(batch, timeoutMilliseconds: 10_000)
      #expect(status.state == .completed || status.error == .invalidArgument)
      try pair.initiator.freeBatch(batch)
    }
  }

  /// A peer stopped by a signal during a copy later goes on as if it had never begun.
  @Test(
    .enabled(if: linux_rseq_area() != nil, "a stopped copy is waited for where it is not guarded"),
    arguments: MemoryKind.allCases, [Opcode.read, .write])
  func whileTheCopierIsStopped(_ kind: MemoryKind, _ opcode: Opcode) throws {
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    let memory = try RegisteredMemory(kind, engine, 1 << 20)
    memory.fill(0x01)
    let peer = try PeerProcess([
      "copy", engine.name, String(UInt(bitPattern: memory.address)), String(memory.count),
      opcode == .read ? "read" : "write", "0", kind == .mapped ? "-" : "ordinary",
    ])
    defer { peer.kill() }
    #expect(try peer.readLine() == "ready")
    for round in 0..<40 {
      usleep(UInt32(2000 + round * 37 % 1000))
      peer.stop()
      let milliseconds = try elapsedMilliseconds { try engine.unregister(memory.address) }
      #expect(milliseconds < 1000, "round \(round)")
      memory.fill(0xEE)
      peer.resume()
      usleep(3000)
      #expect(memory.holdsOnly(0xEE), "round \(round): a stopped copy went on")
      memory.fill(0x01)
      try engine.register(
        memory.address, length: UInt64(memory.count), access: [.remoteRead, .remoteWrite])
    }
    peer.tell()
    let words = try peer.readLine().split(separator: " ")
    try #require(words.first == "done", "\(words)")
    #expect(Int(words[1])! > 40 && UInt64(words[2])! > 0)
  }

  @Test(arguments: MemoryKind.allCases, [Opcode.read, .write])
  func whileTheCopierDies(_ kind: MemoryKind, _ opcode: Opcode) throws {
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    let memory = try RegisteredMemory(kind, engine, 8 << 20)
    for round in 0..<5 {
      let peer = try PeerProcess([
        "copy", engine.name, String(UInt(bitPattern: memory.address)), String(memory.count),
        opcode == .read ? "read" : "write", "0", kind == .mapped ? "-" : "ordinary",
      ])
      #expect(try peer.readLine() == "ready")
      usleep(UInt32(3000 + round * 700))
      peer.kill()
      let milliseconds = try elapsedMilliseconds { try engine.unregister(memory.address) }
      #expect(milliseconds < 1000)
      memory.fill(0xEE)
      usleep(1000)
      #expect(memory.holdsOnly(0xEE))
      try engine.register(
        memory.address, length: UInt64(memory.count), access: [.remoteRead, .remoteWrite])
    }
    // What the dead peer held is released.
    #expect(eventually { engine.sharedMemory?.server.connectionCount == 1 })
  }
}
