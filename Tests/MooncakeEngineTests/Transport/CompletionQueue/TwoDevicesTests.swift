import CompletionQueueTransport
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Two pairs of devices between two engines: both carry bulk, and either does without the other.
struct TwoDevicesTests {
  private static let byteCount = 16 << 20

  private func withPairs(
    _ body: (EnginePair, GuardedMemory, GuardedMemory, [FakeDevice]) throws -> Void
  ) throws {
    let memory = GuardedMemory(Self.byteCount)
    let local = GuardedMemory(Self.byteCount)
    try withPair(.completionQueue, registering: memory) { pair in
      try body(pair, memory, local, pair.initiator.completionQueue.verbs.devices)
    }
  }

  @Test func bulkUsesBoth() throws {
    try withPairs { pair, memory, local, devices in
      local.fill(Pattern(seed: 3))
      try pair.initiator.transfer([
        pair.write(from: local.address, to: memory.address, Self.byteCount)
      ])
      #expect(memory.matches(Pattern(seed: 3)))
      local.fill(0)
      try pair.initiator.transfer([
        pair.read(into: local.address, from: memory.address, Self.byteCount)
      ])
      #expect(local.matches(Pattern(seed: 3)))
      let moved = try pair.initiator.paths(CQTransport.name, to: pair.segment).map(\.movedBytes)
      #expect(moved.count == 2 && moved.reduce(0, +) == 2 * UInt64(Self.byteCount))
      #expect(moved.allSatisfy { $0 >= UInt64(Self.byteCount) / 4 }, "\(moved)")
      #expect(devices.map(\.movedBytes) == moved)
      #expect(pair.initiator.dataAddress.isEmpty && pair.target.dataAddress.isEmpty)
    }
  }

  /// What was posted on a queue pair that fails, and what waits behind it, goes on over the other
  /// one; the first comes back after a rest.
  @Test(arguments: [Opcode.read, .write])
  func oneFails(_ opcode: Opcode) throws {
    try withPairs { pair, memory, local, devices in
      let (from, to) = opcode == .read ? (memory, local) : (local, memory)
      from.fill(Pattern(seed: 4))
      let bulk =
        opcode == .read
        ? pair.read(into: local.address, from: memory.address, Self.byteCount)
        : pair.write(from: local.address, to: memory.address, Self.byteCount)
      devices[0].pause(true)
      let batch = try pair.initiator.start([bulk])
      #expect(eventually { devices[1].movedBytes >= UInt64(Self.byteCount) / 4 })
      usleep(20_000)
      #expect(try pair.initiator.poll(batch).state == .waiting)
      devices[0].isUp = false
      let milliseconds = try elapsedMilliseconds {
        devices[0].pause(false)
        let status = try pair.initiator.wait(batch, timeoutMilliseconds: 10_000)
        #expect(status.state == .completed)
      }
      // How soon is shown on the virtual clock (RouterPathTests); other tests keep processors busy.
      #expect(milliseconds < 2000, "\(milliseconds) ms")
      #expect(to.matches(Pattern(seed: 4)))
      #expect(devices[0].movedBytes == 0 && devices[1].movedBytes == UInt64(Self.byteCount))
      try pair.initiator.freeBatch(batch)
      let path = try pair.initiator.paths(CQTransport.name, to: pair.segment)[0]
      #expect(path.state == "resting" && path.failureCount > 0 && !path.reason.isEmpty)

      // Small transfers find another way while it rests.
      try pair.initiator.transfer([pair.read(into: local.address, from: memory.address, 4096)])
      devices[0].isUp = true
      #expect(
        eventually {
          try? pair.initiator.transfer([bulk])
          return devices[0].movedBytes > 0
        })
      #expect(try pair.initiator.paths(CQTransport.name, to: pair.segment)[0].state == "used")
    }
  }

  /// Without any pair of devices the message names both.
  @Test func bothFail() throws {
    try withPairs { pair, memory, local, devices in
      for device in devices { device.isUp = false }
      let batch = try pair.initiator.start(
        [pair.write(from: local.address, to: memory.address, 4096)], timeoutMilliseconds: 20_000)
      let status = try pair.initiator.wait(batch, timeoutMilliseconds: 20_000)
      #expect(status.state == .failed && status.error == .unreachable)
      let message = pair.initiator.failureMessage(of: batch)
      #expect(message.contains("cq 0-0") && message.contains("cq 1-1"), "\(message)")
      try pair.initiator.freeBatch(batch)
      for device in devices { device.isUp = true }
      try pair.initiator.transfer([pair.write(from: local.address, to: memory.address, 4096)])
    }
  }

  /// A key that was revoked is refused by the peer's device. The descriptor, fetched anew, has the
  /// new one.
  @Test func aKeyThatWasRevoked() throws {
    try withPairs { pair, memory, local, _ in
      let read = pair.read(into: local.address, from: memory.address, 4096)
      try pair.initiator.transfer([read])
      func section() throws -> CQSection {
        let descriptor = try pair.initiator.descriptor(of: pair.segment)
        return try CQSection(
          parsing: descriptor.sections[CQTransport.name] ?? "", bufferCount: 1)
      }
      let former = try section()
      try pair.target.unregister(memory.address)
      try pair.target.register(
        memory.address, length: UInt64(memory.count), access: [.remoteRead, .remoteWrite])
      memory.fill(0x21)
      #expect(try section() == former)
      try pair.initiator.transfer([read])
      #expect(local.bytes[4095] == 0x21)
      let present = try section()
      #expect(present.identity == former.identity)
      #expect(zip(present.keys, former.keys).allSatisfy { $0 != $1 && $0 != 0 })
      let metric = try #require(
        try pair.initiator.completionQueue.metrics.first { $0.name == "cq_queue_pair_failures" })
      #expect(metric.value == 1, "the former key was not refused by a device")
      #expect(try pair.initiator.paths(CQTransport.name, to: pair.segment).count == 2)
    }
  }

  /// Its devices serve a process that does not run.
  @Test func aStoppedProcess() throws {
    let peer = try PeerProcess.serving(byteCount: 1 << 20)
    defer { peer.kill() }
    let engine = try makeEngine(.completionQueue)
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(1 << 20)
    func request(_ opcode: Opcode) -> TransferRequest {
      TransferRequest(
        opcode: opcode, segment: segment, source: local.address, targetOffset: peer.address,
        length: 1 << 20)
    }
    peer.stop()
    try engine.transfer([request(.read)])
    #expect(local.holdsOnly(PeerProcess.fillByte))
    local.fill(0x77)
    try engine.transfer([request(.write)])
    local.fill(0)
    peer.resume()
    try engine.transfer([request(.read)])
    #expect(local.holdsOnly(0x77))
    #expect(try engine.completionQueue.totals.completedSlices == 3)
  }
}
