import CompletionQueueTransport
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Paths that come and go while others submit, cancel, unregister and close.
struct FlappingPathsTests {
  private static let threadCount = 4
  private static let share = 4 << 20

  /// One thread's memory at both ends, and the pattern that it knows to be at the target.
  private struct Worker {
    let pair: EnginePair
    let remote: UnsafeMutableRawPointer
    let seed: UInt8
    let complaints: Complaints

    /// Writes, reads back and compares, sometimes canceling; failures are no complaint.
    func run(_ round: Int, _ generator: inout SeededRandom) throws {
      let local = GuardedMemory(FlappingPathsTests.share)
      let count = [4096, 256 << 10, FlappingPathsTests.share][round % 3]
      let pattern = Pattern(seed: seed &+ UInt8(round % 64))
      local.fill(pattern)
      let write = pair.write(from: local.address, to: remote, count)
      guard try move(write, cancels: Int.random(in: 0..<4, using: &generator) == 0) else { return }
      local.fill(0)
      guard try move(pair.read(into: local.address, from: remote, count), cancels: false) else {
        // It has ended: nothing may arrive any more.
        local.fill(0x5E)
        usleep(2000)
        return complaints.require(local.holdsOnly(0x5E), "bytes arrived after the end")
      }
      let bytes = UnsafeRawBufferPointer(start: local.address, count: count)
      complaints.require(pattern.matches(bytes), "round \(round) of seed \(seed): other bytes")
      complaints.require(local.areGuardsIntact, "round \(round) of seed \(seed) wrote beside")
    }

    private func move(_ request: TransferRequest, cancels: Bool) throws -> Bool {
      let batch = try pair.initiator.start([request], timeoutMilliseconds: 10_000)
      if cancels { try pair.initiator.cancel(batch) }
      let state = try pair.initiator.wait(batch, timeoutMilliseconds: 30_000).state
      try pair.initiator.freeBatch(batch)
      return state == .completed
    }
  }

  @Test(.timeLimit(.minutes(2)))
  func whileEverythingRuns() throws {
    let memory = GuardedMemory(Self.threadCount * Self.share)
    try withPair(.completionQueue, registering: memory) { pair in
      let complaints = Complaints()
      let completedRounds = Atomic<Int>(0)
      let isRunning = Atomic<Bool>(true)
      let workers = try (0..<Self.threadCount).map { index in
        try WorkerThread.start(name: "worker") {
          let worker = Worker(
            pair: pair, remote: memory.address + index * Self.share, seed: UInt8(index * 64),
            complaints: complaints)
          var generator = SeededRandom(seed: UInt64(index))
          var round = 0
          while isRunning.load(ordering: .acquiring) {
            complaints.check("worker \(index)") { try worker.run(round, &generator) }
            completedRounds.add(1, ordering: .relaxed)
            round += 1
          }
        }
      }
      var generator = SeededRandom(seed: 99)
      let devices = try pair.initiator.completionQueue.verbs.devices
      let other = GuardedMemory(4096)
      for step in 0..<40 {
        let device = devices[Int.random(in: 0..<devices.count, using: &generator)]
        device.isUp = false
        usleep(UInt32.random(in: 0..<20_000, using: &generator))
        // Descriptors change meanwhile, and keys with them.
        try pair.target.register(other.address, length: 4096, access: .remoteRead)
        if step == 20 {
          for engine in [pair.target, pair.initiator] { try engine.attach("tcp") }
        }
        device.isUp = true
        if step % 4 == 0 { _ = try pair.initiator.openSegment(pair.target.name) }
        usleep(UInt32.random(in: 0..<20_000, using: &generator))
        try pair.target.unregister(other.address)
      }
      // Paths work again: every thread gets somewhere.
      let seen = completedRounds.load(ordering: .relaxed)
      #expect(
        eventually { completedRounds.load(ordering: .relaxed) > seen + 2 * Self.threadCount })
      isRunning.store(false, ordering: .releasing)
      for worker in workers { worker.join() }
      #expect(complaints.all.isEmpty, "\(complaints.all)")
      #expect(memory.areGuardsIntact)
    }
  }

  /// Engines end while a device goes and comes and others submit.
  @Test(.timeLimit(.minutes(2)))
  func whileEnginesEnd() throws {
    for round in 0..<8 {
      let memory = GuardedMemory(Self.share)
      let pair = try EnginePair(.completionQueue) { target in
        try target.register(
          memory.address, length: UInt64(Self.share), access: [.remoteRead, .remoteWrite])
      }
      let devices = try pair.initiator.completionQueue.verbs.devices
      let isRunning = Atomic<Bool>(true)
      let complaints = Complaints()
      let threads = try (0..<3).map { _ in
        try WorkerThread.start(name: "caller") {
          let local = GuardedMemory(Self.share)
          while isRunning.load(ordering: .acquiring) {
            do throws(MooncakeError) {
              try pair.initiator.transfer([
                pair.read(into: local.address, from: memory.address, Self.share)
              ])
            } catch {
              if error.code == .invalidHandle { break }
            }
          }
          local.fill(0x33)
          usleep(2000)
          complaints.require(local.holdsOnly(0x33), "bytes arrived after the end")
        }
      }
      let flapper = try WorkerThread.start(name: "flapper") {
        while isRunning.load(ordering: .acquiring) {
          for device in devices {
            device.isUp = false
            usleep(1000)
            device.isUp = true
          }
        }
      }
      usleep(UInt32(round) * 5000)
      (round % 2 == 0 ? pair.initiator : pair.target).close()
      pair.initiator.close()
      isRunning.store(false, ordering: .releasing)
      for thread in threads { thread.join() }
      flapper.join()
      pair.close()
      #expect(complaints.all.isEmpty, "\(complaints.all)")
      #expect(memory.areGuardsIntact)
    }
  }
}
