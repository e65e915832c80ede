import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Synchronization
import Testing

/// Deadline, cancellation and progress of an operation.
@Suite struct BoundsTests {
  private func bounds(_ operation: StoreOperation) -> Bounds {
    Bounds(operation, "testing", defaultMilliseconds: 0) { false }
  }

  @Test func everyPhaseIsToldAtOnce() throws {
    let told = Lock<[StoreProgress.Phase]>([])
    var operation = StoreOperation()
    operation.progress = { progress in
      told.withLock { $0.append(progress.phase) }
      return true
    }
    let bounds = bounds(operation)
    let phases: [StoreProgress.Phase] = [.locating, .transferring, .publishing, .draining]
    for phase in phases {
      // Within a phase, reports are rate-limited.
      for _ in 0..<5 { try bounds.report(phase, StoreProgress(phase)) }
      try bounds.reportAgain()
    }
    #expect(told.withLock { $0 } == phases)
    sleepBriefly(nanoseconds: 120_000_000)
    try bounds.reportAgain()
    #expect(told.withLock { $0 } == phases + [.draining])
  }

  /// Hashing a shard may take seconds, on each of several threads.
  @Test(arguments: [false, true])
  func hashingEndsInTheMiddleOfAShard(isCanceled: Bool) throws {
    let layout = try ShardLayout(bufferSizes: [1 << 40], shardBytes: 4 << 30)
    var operation = StoreOperation(timeoutMilliseconds: isCanceled ? 0 : 200)
    let cancellation = try Cancellation()
    operation.cancellation = cancellation
    let canceler = try WorkerThread.start(name: "cancel") {
      sleepBriefly(nanoseconds: 200_000_000)
      if isCanceled { cancellation.cancel() }
    }
    let begin = Clock.now()
    expect(isCanceled ? .canceled : .timeout) {
      _ = try ShardHashing.run(layout, bounds(operation)) { _, pause throws(MooncakeError) in
        let end = Deadline.after(milliseconds: 5000)
        while !end.hasPassed {
          try pause()
          sleepBriefly(nanoseconds: 1_000_000)
        }
        return Digest(high: 0, low: 0)
      }
    }
    let milliseconds = (Clock.now() - begin) / 1_000_000
    #expect((150..<1000).contains(milliseconds), "\(milliseconds) ms")
    canceler.join()
  }

  @Test func aDigestPausesEveryFewMegabytes() throws {
    let memory = Memory((17 << 20) + 5, seed: 1)
    let bytes = UnsafeRawBufferPointer(memory.bytes)
    var count = 0
    let digest = try Digest(of: bytes) { count += 1 }
    #expect(digest == Digest(of: bytes) && count == 4)
    expect(.canceled) {
      _ = try Digest(of: bytes) { () throws(MooncakeError) in throw MooncakeError(.canceled, "") }
    }
  }
}
