import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Peers that lack permission or descriptors, and peers that have died.
struct SharedMemoryFaultTests {
  /// Copies once from another process; returns the bytes it moved through shared memory.
  private static func copy(
    _ name: String, _ address: UInt64, _ count: Int, _ flags: String
  ) throws -> UInt64 {
    let peer = try PeerProcess(["copy", name, String(address), String(count), "read", "3", flags])
    defer { peer.kill() }
    #expect(try peer.readLine() == "ready")
    let words = try peer.readLine().split(separator: " ")
    try #require(words.count == 3 && words[0] == "done", "\(words)")
    #expect(words[1] == "3")
    return UInt64(words[2])!
  }

  @Test(.enabled(if: geteuid() == 0, "only root can become another user"))
  func anotherUser() throws {
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    let memory = try RegisteredMemory(.mapped, engine, 64 << 10)
    let address = UInt64(UInt(bitPattern: memory.address))
    #expect(try Self.copy(engine.name, address, memory.count, "nobody") == 0)
    #expect(try Self.copy(engine.name, address, memory.count, "-") == 3 * UInt64(memory.count))
  }

  /// Mapped memory is shared even where ptrace rules forbid kernel copies.
  @Test(arguments: [
    ("nobody", true), ("nobody,ordinary", true), ("nobody,closed", true),
    ("nobody,closed,ordinary", false),
  ])
  func aProcessThatMayNotBeTraced(_ flags: String, _ isShared: Bool) throws {
    let target = try PeerProcess.serving(["share", String(64 << 10), flags])
    defer { target.kill() }
    let moved = try Self.copy(target.name, target.address, 64 << 10, "nobody")
    #expect(moved == (isShared ? 3 * 64 << 10 : 0))
  }

  /// A stopped process can be copied from: a copy needs none of its threads.
  @Test(arguments: ["-", "ordinary"])
  func aStoppedTarget(_ flags: String) throws {
    let target = try PeerProcess.serving(["share", String(8 << 20), flags])
    defer { target.kill() }
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    let segment = try engine.openSegment(target.name)
    target.stop()
    let local = GuardedMemory(8 << 20)
    for count in [4096, 8 << 20] {
      local.fill(0)
      try engine.transfer(
        [
          TransferRequest(
            opcode: .read, segment: segment, source: local.address, targetOffset: target.address,
            length: UInt64(count))
        ], timeoutMilliseconds: 5000)
      #expect(local.bytes[count - 1] == PeerProcess.fillByte)
    }
  }

  @Test(arguments: ["-", "ordinary"], [Opcode.read, .write])
  func aTargetKilledInMidCopy(_ flags: String, _ opcode: Opcode) throws {
    let target = try PeerProcess.serving(["share", String(32 << 20), flags])
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    let segment = try engine.openSegment(target.name)
    let local = GuardedMemory(32 << 20)
    let request = TransferRequest(
      opcode: opcode, segment: segment, source: local.address, targetOffset: target.address,
      length: 32 << 20)
    let batch = try engine.start(
      [TransferRequest](repeating: request, count: 256), timeoutMilliseconds: 15_000)
    _ = eventually { (try? engine.poll(batch).completedCount).map { $0 > 0 } ?? true }
    target.kill()
    let milliseconds = try elapsedMilliseconds {
      let status = try engine.wait(batch, timeoutMilliseconds: 20_000)
      #expect(status.state == .failed && status.error == .unreachable)
    }
    #expect(milliseconds < 10_000, "\(milliseconds) ms")
    try engine.freeBatch(batch)
    local.fill(0xCC)
    usleep(5000)
    #expect(local.holdsOnly(0xCC))
  }

  @Test(arguments: MemoryKind.allCases)
  func canceledInMidCopy(_ kind: MemoryKind) throws {
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    let target = try RegisteredMemory(kind, pair.target, 64 << 20)
    target.fill(0x01)
    let local = GuardedMemory(64 << 20)
    var canceledCount = 0
    for round in 0..<10 {
      let request = pair.read(into: local.address, from: target.address, 64 << 20)
      let batch = try pair.initiator.start([request, request])
      usleep(UInt32(round * 300))
      try pair.initiator.cancel(batch)
      let milliseconds = try elapsedMilliseconds {
        let state = try pair.initiator.wait(batch, timeoutMilliseconds: 10_000).state
        #expect(state == .canceled || state == .completed)
        if state == .canceled { canceledCount += 1 }
      }
      #expect(milliseconds < 1000)
      try pair.initiator.freeBatch(batch)
      local.fill(0xCC)
      usleep(500)
      #expect(local.holdsOnly(0xCC), "round \(round)")
    }
    #expect(canceledCount > 0)
  }

  @Test func deadlineInMidCopy() throws {
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    let target = try RegisteredMemory(.ordinary, pair.target, 64 << 20)
    let local = GuardedMemory(64 << 20)
    let request = pair.read(into: local.address, from: target.address, 64 << 20)
    let batch = try pair.initiator.start(
      [TransferRequest](repeating: request, count: 64), timeoutMilliseconds: 5)
    let status = try pair.initiator.wait(batch, timeoutMilliseconds: 10_000)
    #expect(status.state == .timeout && status.error == .timeout && status.terminalCount == 64)
    #expect(pair.initiator.failureMessage(of: batch).contains("deadline"))
    try pair.initiator.freeBatch(batch)
    local.fill(0xCC)
    usleep(2000)
    #expect(local.holdsOnly(0xCC))
  }

  /// Offsets and lengths beyond 32 bits.
  @Test func beyondFourGibibytes() throws {
    let size = (4 << 30) + (64 << 20)
    // Holes read as zeros and cost nothing; one range receives every byte.
    let remote = try MemoryMapping.anonymous(byteCount: size)
    let local = try MemoryMapping.anonymous(byteCount: size)
    let (from, to) = (remote.address, local.address)
    let marks = [0, (4 << 30) - 1, 4 << 30, (4 << 30) + 12_345, size - 1]
    for (index, mark) in marks.enumerated() {
      (from + mark).storeBytes(of: UInt8(index + 1), as: UInt8.self)
    }
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    try pair.target.register(from, length: UInt64(size), access: .remoteRead)
    let pages = sysconf(Int32(_SC_AVPHYS_PAGES)) * MemoryMapping.pageBytes
    guard pages > 6 << 30 else { return print("skipped: \(pages) bytes of memory are free") }
    // Four gigabytes of new pages beside other tests: the deadline is not under test.
    try pair.initiator.transfer(
      [pair.read(into: to, from: from, size)], timeoutMilliseconds: 120_000)
    for (index, mark) in marks.enumerated() {
      #expect((to + mark).load(as: UInt8.self) == UInt8(index + 1), "at \(mark)")
    }
    #expect(pair.initiator.streamedBytes == 0)

    let mapped = try RegisteredMemory(.mapped, pair.target, size)
    for mark in marks.dropFirst() {
      try pair.initiator.transfer([pair.write(from: to + mark, to: mapped.address + mark, 1)])
      #expect(
        (mapped.address + mark).load(as: UInt8.self) == (from + mark).load(as: UInt8.self))
    }
  }
}
