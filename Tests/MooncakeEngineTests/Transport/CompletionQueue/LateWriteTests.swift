import CompletionQueueTransport
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Writes that the fabric still has when their queue pair fails: while the peer's side accepts
/// them, nothing else is written there.
struct LateWriteTests {
  /// A pair whose target does not close queue pairs, and where the next write on the first device
  /// stays in the fabric.
  private struct Setting {
    let pair: EnginePair
    let memory: GuardedMemory
    let local: GuardedMemory
    let devices: [FakeDevice]
    let target: FakeTable

    /// Writes a byte to the first page.
    func start(_ byte: UInt8, milliseconds: UInt64 = 10_000) throws -> BatchID {
      let source = local.address + Int(byte) * 4096
      memset(source, Int32(byte), 4096)
      return try pair.initiator.start(
        [pair.write(from: source, to: memory.address, 4096)], timeoutMilliseconds: milliseconds)
    }

    func finish(_ batch: BatchID) throws -> BatchStatus {
      defer { try? pair.initiator.freeBatch(batch) }
      return try pair.initiator.wait(batch, timeoutMilliseconds: 10_000)
    }

    var page: UnsafeRawBufferPointer { .init(start: memory.address, count: 4096) }
    func holds(_ byte: UInt8) -> Bool { page.allSatisfy { $0 == byte } }
  }

  private func withLateWrite(_ body: (Setting) throws -> Void) throws {
    let memory = GuardedMemory(4 << 20)
    try withPair(.completionQueue, registering: memory) { pair in
      let devices = try pair.initiator.completionQueue.verbs.devices
      let target = try pair.target.completionQueue.verbs.table
      target.holdsCloses = true
      devices[0].loseAnswers(1)
      try body(
        Setting(
          pair: pair, memory: memory, local: GuardedMemory(4 << 20), devices: devices,
          target: target))
    }
  }

  @Test func isSentAgainOnlyOnceItIsFenced() throws {
    try withLateWrite { setting in
      let first = try setting.start(1)
      #expect(eventually { setting.devices[0].lateCount == 1 })
      usleep(50_000)
      #expect(try setting.pair.initiator.poll(first).state == .waiting)
      #expect(setting.holds(0) && setting.devices.map(\.movedBytes) == [0, 0])
      // Bulk elsewhere goes on, over both devices, and so do reads.
      let bulk = setting.pair.write(
        from: setting.local.address + (1 << 20), to: setting.memory.address + (1 << 20), 3 << 20)
      #expect(
        eventually {
          try? setting.pair.initiator.transfer([bulk])
          return setting.devices.allSatisfy { $0.movedBytes > 0 }
        })
      #expect(try setting.pair.initiator.poll(first).state == .waiting && setting.holds(0))

      setting.target.holdsCloses = false
      #expect(try setting.finish(first).state == .completed)
      #expect(setting.holds(1))
      #expect(try setting.finish(setting.start(2)).state == .completed)
      #expect(setting.devices[0].deliverLate() == 0, "the peer's queue pair was not closed")
      #expect(setting.holds(2))
    }
  }

  /// After its deadline the write has ended, but a later one must not be overtaken by it.
  @Test func aLaterWriteWaits() throws {
    try withLateWrite { setting in
      let first = try setting.start(1, milliseconds: 100)
      #expect(try setting.finish(first).state == .timeout)
      let second = try setting.start(2)
      usleep(50_000)
      #expect(try setting.pair.initiator.poll(second).state == .waiting && setting.holds(0))
      #expect(setting.devices[0].deliverLate() == 1)
      #expect(setting.holds(1))
      setting.target.holdsCloses = false
      #expect(try setting.finish(second).state == .completed)
      #expect(setting.holds(2))
    }
  }

  /// A peer that does not answer: the write ends with a hint and is not sent again. Others to the
  /// same place fail until the peer answers after all.
  @Test func noFenceInTime() throws {
    try withLateWrite { setting in
      let initiator = setting.pair.initiator
      let first = try setting.start(1)
      _ = try initiator.wait(first, timeoutMilliseconds: 10_000)
      #expect(try initiator.poll(first).error == .unreachable)
      #expect(initiator.failureMessage(of: first).contains("may still"))
      try initiator.freeBatch(first)
      #expect(try setting.finish(setting.start(2)).error == .unreachable)
      #expect(setting.holds(0) && setting.devices.map(\.movedBytes) == [0, 0])
      try initiator.transfer([
        setting.pair.write(
          from: setting.local.address, to: setting.memory.address + 4096, 4096)
      ])
      setting.target.holdsCloses = false
      #expect(
        eventually { (try? setting.finish(setting.start(3)).state == .completed) ?? false })
      #expect(setting.devices[0].deliverLate() == 0 && setting.holds(3))
    }
  }
}
