import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Random batches over buffers that are unregistered at random. No byte of a buffer moves while it
/// is not registered. MOONCAKE_STRESS_SECONDS runs it longer; MOONCAKE_STRESS_SEED repeats a run's
/// choices.
struct RevocationStressTests {
  private static let bufferCount = 6
  private static let localBytes = 4 << 20
  private static let copierCount = 2

  /// The contents of unregistered buffers, which no read may return and no write may change.
  private static let forbidden: UInt8 = 0xEE

  private static func number(_ name: String) -> UInt64? {
    getenv(name).flatMap { UInt64(String(cString: $0)) }
  }

  @Test(arguments: TransportKind.allCases)
  func buffersComeAndGo(_ kind: TransportKind) throws {
    let seed = Self.number("MOONCAKE_STRESS_SEED") ?? .random(in: 0 ... .max)
    print("\(kind): MOONCAKE_STRESS_SEED=\(seed)")
    let end = Deadline.after(milliseconds: (Self.number("MOONCAKE_STRESS_SECONDS") ?? 2) * 1000)
    let pair = try EnginePair(kind)
    defer { pair.close() }
    var generator = SeededRandom(seed: seed)
    let buffers = try (0..<Self.bufferCount).map { index in
      try RegisteredMemory(
        index % 2 == 0 ? .mapped : .ordinary, pair.target,
        [5000, 64 << 10, 700_000, 3 << 20].randomElement(using: &generator)!)
    }
    let complaints = Complaints()
    let isOver = Atomic<Bool>(false)
    let completed = Atomic<Int>(0)
    let copiers = try (0..<Self.copierCount).map { index in
      try WorkerThread.start(name: "copier\(index)") {
        let copier = Copier(pair, buffers, seed &+ UInt64(index) &+ 1, isRegistered: index == 0)
        while !isOver.load(ordering: .relaxed) {
          complaints.check("copier \(index)") {
            if try copier.runBatch() { completed.add(1, ordering: .relaxed) }
          }
          complaints.require(copier.isClean, "copier \(index): bytes of revoked memory arrived")
        }
      }
    }
    var rounds = 0
    while !end.hasPassed && complaints.all.isEmpty {
      let memory = buffers.randomElement(using: &generator)!
      try pair.target.unregister(memory.address)
      memory.fill(Self.forbidden)
      usleep(UInt32.random(in: 0..<400, using: &generator))
      complaints.require(
        memory.holdsOnly(Self.forbidden), "round \(rounds): revoked memory was written")
      memory.fill(0x01)
      try pair.target.register(
        memory.address, length: UInt64(memory.count), access: [.remoteRead, .remoteWrite])
      usleep(UInt32.random(in: 0..<3000, using: &generator))
      rounds += 1
    }
    isOver.store(true, ordering: .relaxed)
    for copier in copiers { copier.join() }
    #expect(complaints.all.isEmpty, "seed \(seed): \(complaints.all.prefix(5))")
    let count = completed.load(ordering: .relaxed)
    #expect(rounds > 10 && count > 0, "\(rounds) rounds, \(count) batches")
  }

  /// One thread's batches.
  private final class Copier {
    private let pair: EnginePair
    private let buffers: [RegisteredMemory]
    private let local: RegisteredMemory
    private var generator: SeededRandom

    init(_ pair: EnginePair, _ buffers: [RegisteredMemory], _ seed: UInt64, isRegistered: Bool) {
      self.pair = pair
      self.buffers = buffers
      generator = SeededRandom(seed: seed)
      // Only registered local memory is used for mapped copies.
      local = try! RegisteredMemory(.ordinary, pair.initiator, localBytes, access: .local)
      if !isRegistered { try! pair.initiator.unregister(local.address) }
    }

    var isClean: Bool { memchr(local.address, Int32(forbidden), local.count) == nil }

    /// Whether all of it was completed.
    func runBatch() throws -> Bool {
      var requests: [TransferRequest] = []
      var offset = 0
      for _ in 0..<Int.random(in: 1...24, using: &generator) {
        let memory = buffers.randomElement(using: &generator)!
        let limit = min(memory.count, localBytes - offset)
        let longest = Bool.random(using: &generator) ? min(limit, 4096) : limit
        if longest <= 0 { break }
        let count = Int.random(in: 1...longest, using: &generator)
        let place = memory.address + Int.random(in: 0...(memory.count - count), using: &generator)
        let here = local.address + offset
        let isRead = Bool.random(using: &generator)
        memset(here, isRead ? 0x00 : 0x02, count)
        requests.append(
          isRead
            ? pair.read(into: here, from: place, count) : pair.write(from: here, to: place, count))
        offset += count
      }
      let batch = try pair.initiator.start(requests, timeoutMilliseconds: 10_000)
      let status = try pair.initiator.wait(batch, timeoutMilliseconds: 20_000)
      try pair.initiator.freeBatch(batch)
      return status.state == .completed
    }
  }
}
