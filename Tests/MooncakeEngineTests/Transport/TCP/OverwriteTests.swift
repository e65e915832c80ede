import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Writes that end early, followed by others to the same place, with a real peer that is stopped
/// and resumed at random: what a completed write has stored stays.
struct OverwriteTests {
  @Test(.timeLimit(.minutes(15)))
  func aCompletedWriteStays() throws {
    let seed =
      Environment["MOONCAKE_STRESS_SEED"].flatMap { UInt64($0) } ?? .random(in: 1 ... .max)
    let seconds = Environment["MOONCAKE_STRESS_SECONDS"].flatMap { UInt64($0) } ?? 4
    print("overwrite: seed \(seed), \(seconds) s (MOONCAKE_STRESS_SEED, MOONCAKE_STRESS_SECONDS)")
    let run = try OverwriteRun(seed: seed)
    defer { run.close() }
    let end = Clock.now() + seconds * 1_000_000_000
    while Clock.now() < end { try run.round() }
    try run.finish()
    let counts = run.counts.map { "\($0.key) \($0.value)" }.sorted()
    print("overwrite: \(counts.joined(separator: ", "))")
    #expect((run.counts[.completed] ?? 0) > 0 && (run.counts[.timeout] ?? 0) > 0)
  }
}

private final class OverwriteRun {
  private static let slotBytes = 96 << 10
  private static let slotCount = 12

  /// Peer memory that is written repeatedly, each time with another byte. Reads after a completed
  /// write, now and a moment later, must return its byte, whatever became of earlier writes.
  private final class Slot {
    let index: Int
    let source = GuardedMemory(OverwriteRun.slotBytes)
    let copy = GuardedMemory(OverwriteRun.slotBytes)
    var byte: UInt8 = 0
    var batch: BatchID?
    var isCompleted = false

    init(_ index: Int) { self.index = index }
  }

  private(set) var counts: [TransferState: Int] = [:]
  private let seed: UInt64
  private var random: SeededRandom
  private let peer: PeerProcess
  private let engine: TransferEngine
  private let segment: SegmentID
  private let slots = (0..<slotCount).map { Slot($0) }
  private var isStopped = false

  init(seed: UInt64) throws {
    self.seed = seed
    random = SeededRandom(seed: seed)
    peer = try PeerProcess.serving(byteCount: Self.slotCount * Self.slotBytes)
    engine = try makeEngine()
    segment = try engine.openSegment(peer.name)
  }

  func close() {
    engine.close()
    peer.kill()
  }

  func round() throws {
    if random.next(below: 4) == 0 {
      if isStopped { peer.resume() } else { peer.stop() }
      isStopped.toggle()
    }
    for slot in slots where slot.batch == nil {
      if slot.isCompleted, random.next(below: 3) == 0 { verify(slot) }
      slot.byte = slot.byte % 250 + 1
      slot.source.fill(slot.byte)
      slot.isCompleted = false
      slot.batch = try engine.start(
        [request(slot, .write)], timeoutMilliseconds: 1 + UInt64(random.next(below: 40)))
    }
    usleep(UInt32(random.next(below: 8000)))
    for slot in slots { try endIfDue(slot) }
  }

  private func endIfDue(_ slot: Slot) throws {
    guard let batch = slot.batch else { return }
    if random.next(below: 8) == 0 { try engine.cancel(batch) }
    let isOver = try engine.poll(batch).state.isTerminal
    guard isOver || random.next(below: 3) == 0 else { return }
    let state = try engine.wait(batch, timeoutMilliseconds: 10_000).state
    counts[state, default: 0] += 1
    try engine.freeBatch(batch)
    slot.batch = nil
    slot.isCompleted = state == .completed
    // Terminal: the memory is the caller's again, and nothing may still be sent from it.
    slot.source.fill(0xEE)
    if slot.isCompleted { verify(slot) }
  }

  /// In the end everything can be written again.
  func finish() throws {
    peer.resume()
    isStopped = false
    for slot in slots {
      if let batch = slot.batch { _ = try engine.wait(batch, timeoutMilliseconds: 10_000) }
      slot.byte = 0xFD
      slot.source.fill(slot.byte)
      try engine.transfer([request(slot, .write)], timeoutMilliseconds: 10_000)
    }
    usleep(100_000)
    for slot in slots { verify(slot) }
  }

  private func verify(_ slot: Slot) {
    if isStopped { return }
    slot.copy.fill(0)
    do throws(MooncakeError) {
      try engine.transfer([request(slot, .read)], timeoutMilliseconds: 5000)
    } catch {
      Issue.record("seed \(seed): slot \(slot.index): \(error.message)")
    }
    #expect(slot.copy.holdsOnly(slot.byte), "seed \(seed): slot \(slot.index) was overwritten")
  }

  private func request(_ slot: Slot, _ opcode: Opcode) -> TransferRequest {
    TransferRequest(
      opcode: opcode, segment: segment,
      source: opcode == .write ? slot.source.address : slot.copy.address,
      targetOffset: peer.address + UInt64(slot.index * Self.slotBytes),
      length: UInt64(Self.slotBytes))
  }
}
