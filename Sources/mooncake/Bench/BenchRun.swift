import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// The result of a run.
struct BenchResult {
  var workload: Workload
  var tally: Tally
  var seconds: Double
  var processorSeconds: Double
  var wasInterrupted: Bool
  /// The transports that carried bytes, such as "tcp"; nil if no bytes were moved.
  var carriers: String?

  var bytesPerSecond: Double { seconds > 0 ? Double(tally.bytes) / seconds : 0 }
  var operationsPerSecond: Double { seconds > 0 ? Double(tally.requests) / seconds : 0 }
  var processorSecondsPerGigabyte: Double {
    tally.bytes > 0 ? processorSeconds * 1e9 / Double(tally.bytes) : 0
  }
}

/// A buffer of an open segment.
struct BenchTarget {
  var segment: Int32
  var buffer: RemoteBuffer
}

/// Runs one workload against the buffers of open segments.
struct BenchRun {
  let engine: TransferEngine
  /// Not empty.
  let targets: [BenchTarget]
  /// Bytes of local memory to spread transfers over, for all threads together.
  let localBytes: Int
  let stop: StopRequest

  /// How much of each target is used.
  private var bufferBytes: UInt64 { targets.map(\.buffer.length).min() ?? 0 }

  /// Bytes from one thread's part of a target to the next; whole pages if no block is lost by that.
  private func partBytes(_ workload: Workload) -> UInt64 {
    let share = bufferBytes / UInt64(workload.threadCount)
    let aligned = share & ~4095
    let block = UInt64(workload.blockBytes)
    return aligned / block == share / block ? aligned : share
  }

  /// Blocks that each thread has to itself, over all targets.
  private func blocksPerThread(_ workload: Workload) throws(MooncakeError) -> UInt64 {
    let blocks = partBytes(workload) / UInt64(workload.blockBytes) &* UInt64(targets.count)
    if blocks < UInt64(workload.batchSize) {
      throw MooncakeError(
        .invalidArgument,
        "the target's buffer of \(bufferBytes) bytes is too small for \(workload.threadCount)"
          + " thread(s) x \(workload.batchSize) block(s) of \(workload.blockBytes) bytes; use a"
          + " larger target buffer or a smaller --block-size, --batch-size or --threads")
    }
    if workload.pattern == .same { return UInt64(workload.batchSize) }
    if workload.verification == nil { return blocks }
    // A verified run keeps a counter per block; more than this many would take too much memory.
    return min(blocks, max(1 << 24, UInt64(workload.batchSize)))
  }

  func run(_ workload: Workload) throws(MooncakeError) -> BenchResult {
    let blockCount = try blocksPerThread(workload)
    var areas: [WorkArea] = []
    defer { for area in areas { release(area) } }
    for index in 0..<workload.threadCount {
      areas.append(try makeArea(workload, index: index, blockCount: blockCount))
    }
    let workers = areas.map {
      BenchWorker(engine: engine, workload: workload, area: $0, stop: stop)
    }
    let before = EngineCounters(engine)
    let snapshot = try runTogether(workers)

    var tally = Tally()
    for worker in workers { tally.add(worker.tally) }
    return BenchResult(
      workload: workload, tally: tally,
      seconds: Double(max(tally.end, snapshot.begin) - snapshot.begin) / 1e9,
      processorSeconds: snapshot.processorEnd - snapshot.processorBegin,
      wasInterrupted: stop.isRequested, carriers: EngineCounters(engine).carriers(since: before))
  }

  /// Runs each worker on its own thread, or none if a thread cannot be started.
  private func runTogether(_ workers: [BenchWorker]) throws(MooncakeError) -> Snapshot {
    let shared = SharedRun(threadCount: workers.count)
    var threads: [WorkerThread] = []
    var failure: Errno?
    for worker in workers where failure == nil {
      do {
        threads.append(try WorkerThread.start(name: "bench") { shared.run(worker) })
      } catch {
        failure = error
      }
    }
    shared.start(failure == nil)
    for thread in threads { thread.join() }
    if let failure { throw MooncakeError(.system, "cannot start a thread: \(failure)") }
    return shared.snapshot.withLock { $0 }
  }

  private func makeArea(
    _ workload: Workload, index: Int, blockCount: UInt64
  ) throws(MooncakeError) -> WorkArea {
    let wanted = min(
      UInt64(max(0, localBytes / workload.threadCount)) / UInt64(workload.blockBytes), blockCount)
    let slots = max(workload.batchSize, Int(wanted))
    let local = try allocateTouched(slots * workload.blockBytes)
    var readBack: UnsafeMutableRawPointer?
    if workload.verification != nil && workload.operation != .read {
      do {
        readBack = try allocateTouched(workload.batchBytes)
      } catch {
        try? engine.free(local)
        throw error
      }
    }
    return WorkArea(
      targets: targets, partOffset: UInt64(index) &* partBytes(workload), blockCount: blockCount,
      local: local, localSlots: slots, readBack: readBack)
  }

  private func allocateTouched(_ byteCount: Int) throws(MooncakeError) -> UnsafeMutableRawPointer {
    let memory = try engine.allocate(length: UInt64(byteCount), access: .local)
    memset(memory, 0xA5, byteCount)
    return memory
  }

  private func release(_ area: WorkArea) {
    try? engine.free(area.local)
    if let readBack = area.readBack { try? engine.free(readBack) }
  }
}

/// The time and the processor time at the beginning and the end of the measured phase.
private struct Snapshot {
  var begin: UInt64 = 0
  var processorBegin = 0.0
  var processorEnd = 0.0
}

/// State shared by the threads of a run.
private final class SharedRun: Sendable {
  let snapshot = Mutex(Snapshot())
  private let barrier: PhaseBarrier
  /// 0: wait; 1: run; 2: end at once.
  private let gate = Futex()

  init(threadCount: Int) { barrier = PhaseBarrier(count: threadCount) }

  func start(_ isComplete: Bool) {
    gate.store(isComplete ? 1 : 2)
    gate.wakeAll()
  }

  func run(_ worker: BenchWorker) {
    while gate.value == 0 { gate.wait(while: 0, until: .never) }
    if gate.value == 2 { return }
    worker.prepare()
    worker.warmUp()
    barrier.wait {
      snapshot.withLock {
        $0.processorBegin = ProcessorTime.now().seconds
        $0.begin = Clock.now()
      }
    }
    worker.measure()
    barrier.wait { snapshot.withLock { $0.processorEnd = ProcessorTime.now().seconds } }
  }
}
