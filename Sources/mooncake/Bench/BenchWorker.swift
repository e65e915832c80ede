import Glibc
import Histogram
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// One thread's measurements.
struct Tally {
  /// Nanoseconds of each batch, from before the submit until its end is seen.
  var latencies = Histogram<UInt64>(
    highestTrackableValue: 86_400_000_000_000, numberOfSignificantValueDigits: .three)
  var bytes: UInt64 = 0
  var requests: UInt64 = 0
  var batches: UInt64 = 0
  var verifiedBytes: UInt64 = 0
  var errorCount: UInt64 = 0
  var firstError: String?
  var end: UInt64 = 0
}

/// The part of the targets that one thread uses, and its local memory.
struct WorkArea {
  var targets: [BenchTarget]
  /// Offset of the thread's part in each target's buffer.
  var partOffset: UInt64
  /// Blocks over all targets; consecutive ones are in different targets.
  var blockCount: UInt64
  var local: UnsafeMutableRawPointer
  var localSlots: Int
  /// Memory of one batch for reading blocks back; nil unless writes are verified.
  var readBack: UnsafeMutableRawPointer?
}

/// Runs the batches of one thread.
final class BenchWorker: @unchecked Sendable {
  // Unchecked: used by one thread only, until it has been joined.
  private(set) var tally = Tally()

  private let engine: TransferEngine
  private let workload: Workload
  private let area: WorkArea
  private let stop: StopRequest
  private let order: ScatteredOrder
  private let requests: UnsafeMutableBufferPointer<TransferRequest>
  /// Blocks of the batch in flight.
  private let blocks: UnsafeMutableBufferPointer<UInt64>
  /// How often each block was written; empty unless writes are verified.
  private var generations: [UInt32] = []
  private var position: UInt64 = 0
  private var localPosition = 0
  private var batchNumber: UInt64 = 0

  init(engine: TransferEngine, workload: Workload, area: WorkArea, stop: StopRequest) {
    self.engine = engine
    self.workload = workload
    self.area = area
    self.stop = stop
    order = ScatteredOrder(count: area.blockCount)
    requests = .allocate(capacity: workload.batchSize)
    requests.initialize(
      repeating: TransferRequest(
        opcode: .read, segment: 0, source: nil, targetOffset: 0, length: 0))
    blocks = .allocate(capacity: workload.batchSize)
    blocks.initialize(repeating: 0)
    if workload.verification != nil && workload.operation != .read {
      generations = Array(repeating: 0, count: Int(area.blockCount))
    }
  }

  deinit {
    requests.deallocate()
    blocks.deallocate()
  }

  /// Writes the pattern to everything that a verified run will read. The pattern depends only on
  /// the offset, so the pieces need not be blocks.
  func prepare() {
    guard workload.writesFirst, let contents = workload.verification?.contents else { return }
    let targetCount = UInt64(area.targets.count)
    let total =
      (area.blockCount &+ targetCount - 1) / targetCount &* UInt64(workload.blockBytes)
    for target in area.targets { fill(target, total, contents) }
  }

  private func fill(_ target: BenchTarget, _ total: UInt64, _ contents: BlockPattern) {
    let piece = UInt64(area.localSlots * workload.blockBytes)
    var done: UInt64 = 0
    while done < total && !hasEnded {
      let count = min(piece, total - done)
      let at = area.partOffset &+ done
      contents.fill(area.local, count: Int(count), offset: at, generation: 0)
      requests[0] = TransferRequest(
        opcode: .write, segment: target.segment, source: area.local,
        targetOffset: target.buffer.address &+ at, length: count)
      attempt { () throws(MooncakeError) in try execute(1) }
      done += count
    }
  }

  /// Runs without counting.
  func warmUp() {
    let deadline = Deadline(nanoseconds: Clock.now() &+ workload.warmupNanoseconds)
    while !hasEnded && !deadline.hasPassed { _ = runBatch() }
    tally = Tally(errors: tally)
  }

  /// Runs the measured batches.
  func measure() {
    var deadline = UInt64.max
    var limit = UInt64.max
    switch workload.length {
    case .nanoseconds(let span): deadline = Clock.now() &+ span
    case .iterations(let count): limit = count
    }
    var now: UInt64 = 0
    while tally.batches < limit && now < deadline && !hasEnded { now = runBatch() }
    tally.end = Clock.now()
  }

  private var hasEnded: Bool { stop.isRequested || tally.errorCount > 0 }

  /// Runs one batch with its verification; returns the time at its end.
  private func runBatch() -> UInt64 {
    let count = workload.batchSize
    let writes =
      workload.operation == .write || (workload.operation == .mixed && batchNumber & 1 == 1)
    choose(opcode: writes ? .write : .read)
    batchNumber &+= 1

    let begin = Clock.now()
    guard attempt({ () throws(MooncakeError) in try execute(count) }) else { return Clock.now() }
    let end = Clock.now()
    tally.latencies.record(end &- begin)
    tally.bytes &+= UInt64(workload.batchBytes)
    tally.requests &+= UInt64(count)
    tally.batches &+= 1
    if workload.verification == nil { return end }
    verify(writes: writes)
    return Clock.now()
  }

  /// Fills in the requests of the next batch.
  private func choose(opcode: Opcode) {
    for index in 0..<workload.batchSize {
      let at = position &+ UInt64(index)
      let block: UInt64
      switch workload.pattern {
      case .same: block = UInt64(index)
      case .fixed: block = 0
      case .sequential: block = at % area.blockCount
      case .random: block = order(at)
      }
      blocks[index] = block
      let memory = slot(workload.pattern == .fixed ? 0 : localPosition + index)
      set(index, opcode: opcode, block: block, memory: memory)
      guard let contents = workload.verification?.contents else { continue }
      if opcode == .read {
        spoil(memory)
      } else {
        generations[Int(block)] &+= 1
        contents.fill(
          memory, count: workload.blockBytes, offset: offset(block),
          generation: generations[Int(block)])
      }
    }
    position &+= UInt64(workload.batchSize)
    localPosition = (localPosition + workload.batchSize) % area.localSlots
  }

  /// Overwrites memory before a read, so that only bytes of this read can pass the check.
  private func spoil(_ memory: UnsafeMutableRawPointer) {
    memset(memory, 0x55, workload.blockBytes)
  }

  private func set(
    _ index: Int, opcode: Opcode, block: UInt64, memory: UnsafeMutableRawPointer
  ) {
    let target = area.targets[Int(block % UInt64(area.targets.count))]
    requests[index] = TransferRequest(
      opcode: opcode, segment: target.segment, source: memory,
      targetOffset: target.buffer.address &+ offset(block),
      length: UInt64(workload.blockBytes))
  }

  private func slot(_ index: Int) -> UnsafeMutableRawPointer {
    area.local + (index % area.localSlots) * workload.blockBytes
  }

  /// Where a block begins in its target's buffer.
  private func offset(_ block: UInt64) -> UInt64 {
    area.partOffset &+ block / UInt64(area.targets.count) &* UInt64(workload.blockBytes)
  }

  private func execute(_ count: Int) throws(MooncakeError) {
    let batchRequests = UnsafeBufferPointer(rebasing: requests[..<count])
    if count == 1 && !workload.usesBatches {
      try engine.transfer(batchRequests, timeoutMilliseconds: workload.timeoutMilliseconds)
      return
    }
    let batch = try engine.createBatch(capacity: count)
    // This fails while a request is in flight; then the engine frees the batch when it ends.
    defer { try? engine.freeBatch(batch) }
    try engine.submit(
      batch, batchRequests, timeoutMilliseconds: workload.timeoutMilliseconds, notification: nil)
    let status = try engine.wait(batch, timeoutMilliseconds: 0)
    if status.state != .completed {
      let message = engine.failureMessage(of: batch)
      throw MooncakeError(
        status.error ?? .system, message.isEmpty ? "the batch ended as \(status.state)" : message)
    }
  }

  @discardableResult
  private func attempt(_ body: () throws(MooncakeError) -> Void) -> Bool {
    do {
      try body()
      return true
    } catch {
      fail(error.message)
      return false
    }
  }

  private func fail(_ message: String) {
    tally.errorCount += 1
    if tally.firstError == nil { tally.firstError = message }
  }

  private func verify(writes: Bool) {
    guard let contents = workload.verification?.contents else { return }
    if writes {
      guard let readBack = area.readBack else { return }
      for index in 0..<workload.batchSize {
        let memory = readBack + index * workload.blockBytes
        spoil(memory)
        set(index, opcode: .read, block: blocks[index], memory: memory)
      }
      guard attempt({ () throws(MooncakeError) in try execute(workload.batchSize) }) else { return }
    }
    for index in 0..<workload.batchSize {
      check(contents, block: blocks[index], memory: requests[index].source)
    }
  }

  private func check(
    _ contents: BlockPattern, block: UInt64, memory: UnsafeMutableRawPointer?
  ) {
    guard let memory else { return }
    let generation = generations.isEmpty ? 0 : generations[Int(block)]
    tally.verifiedBytes &+= UInt64(workload.blockBytes)
    guard
      let found = contents.mismatch(
        in: memory, count: workload.blockBytes, offset: offset(block), generation: generation)
    else { return }
    let at = offset(block) &+ UInt64(found.position)
    let byte = memory.load(fromByteOffset: found.position, as: UInt8.self)
    fail(
      "wrong data at offset \(at) of the target's buffer (byte \(found.position) of block"
        + " \(block)): expected \(hexadecimal(UInt64(found.expected))),"
        + " found \(hexadecimal(UInt64(byte)))")
  }
}

extension Tally {
  /// An empty tally that keeps the errors of another.
  init(errors other: Tally) {
    errorCount = other.errorCount
    firstError = other.firstError
  }

  mutating func add(_ other: Tally) {
    latencies.add(other.latencies)
    bytes &+= other.bytes
    requests &+= other.requests
    batches &+= other.batches
    verifiedBytes &+= other.verifiedBytes
    errorCount &+= other.errorCount
    if firstError == nil { firstError = other.firstError }
    end = max(end, other.end)
  }
}
