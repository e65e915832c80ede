import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Moves a range of a payload between the caller's memory and the holders, trying one holder after
/// another until everything has moved.
struct RangeTransfer {
  private let engine: TransferEngine
  private let workers: WorkerPool
  private let manifest: Manifest
  private let opcode: Opcode
  private let memory: UnsafeMutableRawPointer
  private let start: UInt64
  private let end: UInt64
  private let bounds: Bounds
  private let reader = UInt64.random(in: 1 ... .max)
  /// Number of the latest request to a holder.
  private var turn: UInt64 = 0
  /// All bytes before it have moved.
  private var position: UInt64
  private var failures: [String] = []
  /// Most bytes per grant; reduced if the link is so slow that grants expire during a move.
  private var stepBytes: UInt64

  /// Most bytes, and shards, per request.
  private static let stepShards = 64
  private static let mostWrittenBytes: UInt64 = 64 << 20
  private static let leastWrittenBytes: UInt64 = 256 << 10
  private static let askMilliseconds: UInt64 = 2000
  /// How soon, and how late, a busy holder is asked again, whatever it says.
  private static let pauseMilliseconds: ClosedRange<UInt64> = 1...2000

  init(
    _ engine: TransferEngine, _ workers: WorkerPool, _ manifest: Manifest, _ opcode: Opcode,
    offset: UInt64,
    memory: UnsafeMutableRawPointer, length: UInt64, _ bounds: Bounds
  ) {
    self.engine = engine
    self.workers = workers
    self.manifest = manifest
    self.opcode = opcode
    self.memory = memory
    self.bounds = bounds
    start = offset
    end = offset + length
    position = offset
    stepBytes = opcode == .write ? Self.mostWrittenBytes : .max
  }

  /// Reads come from any holder of the range; writes go to the origin, the only holder that a
  /// writable payload has.
  mutating func run(
    _ holders: [HolderRecord], after search: ManifestSearch.Outcome
  ) throws(MooncakeError) {
    var code = MooncakeError.Code.noHolder
    // A silent holder costs a wait, so those known to answer come first.
    func rank(_ holder: HolderAddress) -> Int {
      search.silent.contains(holder) ? 2 : holder == search.source ? 0 : 1
    }
    for record in holders.shuffled().sorted(by: { rank($0.holder) < rank($1.holder) }) {
      try bounds.check("\(end - position) bytes left")
      do throws(MooncakeError) {
        let deadline = min(bounds.deadline, .after(milliseconds: Self.askMilliseconds))
        let known = record.holder == search.source ? search.sourceIndex : nil
        let connection = try open(record.holder, known: known, until: deadline)
        defer { connection.close(engine) }
        while position < end { if try !step(connection) { break } }
      } catch {
        if error.code == .canceled { throw error }
        try bounds.check("\(end - position) bytes left")
        if error.code == .unsupported { code = .unsupported }
        failures.append("\(record.holder.segment) at \(record.holder.rpc): \(error.message)")
      }
      if position == end { return }
    }
    throw MooncakeError(
      code,
      "payload: no live holder for bytes \(position) to \(end); tried: "
        + failures.joined(separator: "; "))
  }

  private func open(
    _ holder: HolderAddress, known: HolderConnection.Index?, until deadline: Deadline
  ) throws(MooncakeError) -> HolderConnection {
    let left = EndMark()
    defer { left.set() }
    let abandon: @Sendable (HolderConnection) -> Void = { [engine] in $0.close(engine) }
    return try bounds.wait("opening a holder", abandon: abandon) {
      HolderConnection.open(
        engine, workers, holder, manifest, known: known, until: deadline,
        for: .init(isWaiting: { !left.isSet }), $0)
    }
  }

  /// Moves what one grant allows; returns false if this holder has nothing more for us.
  private mutating func step(_ connection: HolderConnection) throws(MooncakeError) -> Bool {
    let stop = position + min(stepBytes, end - position)
    var shards = manifest.layout.shards(in: position..<stop)
    shards = shards.lowerBound..<min(shards.upperBound, shards.lowerBound + Self.stepShards)
    let start = Clock.now()
    let answer = try ask(connection.holder, wanted: shards)
    // A later write could land in whatever the holder keeps there by then.
    let lease =
      opcode == .read
      ? Deadline.never : Deadline(nanoseconds: start + answer.leaseMilliseconds * 900_000)
    switch answer.state {
    case .gone:
      throw MooncakeError(.notFound, "it no longer holds this version")
    case .busy:
      try wait(milliseconds: answer.retryMilliseconds)
      return true
    case .serving: break
    }
    // The granted shards, from the first one on, without a gap.
    let granted = Set(answer.granted)
    var last = shards.lowerBound
    while last < shards.upperBound, granted.contains(last) { last += 1 }
    let reached: UInt64
    do throws(MooncakeError) {
      reached = try move(connection, shards.lowerBound..<last, stop, until: lease)
    } catch {
      let farewell = try? ask(connection.holder, wanted: 0..<0)
      guard error.code == .timeout, lease.hasPassed, farewell?.state == .serving,
        stepBytes > Self.leastWrittenBytes
      else { throw error }
      stepBytes = max(stepBytes / 8, Self.leastWrittenBytes)
      return true
    }
    // If the holder has withdrawn the payload, the memory may already have held something else.
    let farewell = try ask(connection.holder, wanted: 0..<0)
    if farewell.state == .gone {
      throw MooncakeError(
        .notFound,
        opcode == .read
          ? "it withdrew the payload while it was read"
          : "it withdrew the payload while it was written: what was written is lost")
    }
    let hasMoved = reached > position
    position = reached
    if !hasMoved { failures.append("\(connection.holder.segment): it lacks shard \(last)") }
    return hasMoved
  }

  /// Waits as long as a busy holder says, so that many waiting readers cost it little.
  private func wait(milliseconds: UInt64) throws(MooncakeError) {
    let (least, most) = (Self.pauseMilliseconds.lowerBound, Self.pauseMilliseconds.upperBound)
    let pause = min(max(milliseconds, least), most)
    // Spread out, so that those refused together do not return together.
    let end = Deadline.after(milliseconds: UInt64.random(in: pause...(pause + pause / 4)))
    while !end.hasPassed {
      try bounds.check("waiting for a busy holder")
      bounds.sleep(orReadable: -1, until: end)
    }
  }

  /// Asks for shards; anything granted earlier must not be read any more.
  private mutating func ask(
    _ holder: HolderAddress, wanted: Range<Int>
  ) throws(MooncakeError) -> ShardAnswer {
    turn += 1
    let request = ShardRequest(
      holding: holder.holding, version: manifest.version, reader: reader, own: nil,
      have: ShardSet(count: manifest.layout.shardCount), wanted: wanted, turn: turn, reading: [],
      limit: wanted.count)
    let deadline = min(bounds.deadline, .after(milliseconds: Self.askMilliseconds))
    return try bounds.wait("asking a holder") { [engine] in
      StoreService.ask(engine, holder, request, until: deadline, $0)
    }
  }

  /// Moves the part of the range that lies in some shards and before `limit`; returns where it
  /// stopped.
  private func move(
    _ connection: HolderConnection, _ shards: Range<Int>, _ limit: UInt64, until lease: Deadline
  ) throws(MooncakeError) -> UInt64 {
    var requests: [TransferRequest] = []
    var reached = position
    for shard in shards {
      let range = manifest.layout.range(ofShard: shard)
      let stop = min(limit, range.offset + range.length)
      guard let remote = connection.layout.address(of: reached, length: stop - reached) else {
        throw MooncakeError(.protocolViolation, "its buffers do not hold whole shards")
      }
      requests.append(
        TransferRequest(
          opcode: opcode, segment: connection.segment, source: memory + Int(reached - start),
          targetOffset: remote, length: stop - reached))
      reached = stop
    }
    if !requests.isEmpty { try run(requests, until: min(bounds.deadline, lease)) }
    return reached
  }

  /// Moves requests; after a failure none of them touches the caller's memory any more.
  private func run(
    _ requests: [TransferRequest], until deadline: Deadline
  ) throws(MooncakeError) {
    if deadline.hasPassed {
      throw MooncakeError(.timeout, "the grant expired before the write began")
    }
    let batch = try engine.createBatch(capacity: requests.count)
    defer { try? engine.freeBatch(batch) }
    let event = try engine.eventDescriptor(of: batch)
    try engine.submit(
      batch, count: requests.count,
      timeoutMilliseconds: HolderConnection.milliseconds(until: deadline),
      notification: nil
    ) { RawRequest(requests[$0]) }
    do throws(MooncakeError) {
      while try !engine.poll(batch).state.isTerminal {
        try bounds.check("\(end - position) bytes left")
        bounds.sleep(orReadable: event)
      }
    } catch {
      try? engine.cancel(batch)
      _ = try? engine.wait(batch)
      throw error
    }
    let status = try engine.poll(batch)
    if status.state != .completed {
      throw MooncakeError(status.error ?? .canceled, engine.failureMessage(of: batch))
    }
  }
}

/// Tells workers that a caller no longer waits.
private final class EndMark: Sendable {
  private let mark = Atomic(false)
  var isSet: Bool { mark.load(ordering: .acquiring) }
  func set() { mark.store(true, ordering: .releasing) }
}
