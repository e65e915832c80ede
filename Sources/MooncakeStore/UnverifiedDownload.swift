import MooncakeEngine
import MooncakeSystem

/// Fetches a payload that the existing system registered: shards by their locations, without
/// digests. Several shards at once; each from any location, then from the others.
struct UnverifiedDownload {
  private let engine: TransferEngine
  private let workers: WorkerPool
  private let document: SharedDocument
  private let layout: BufferLayout
  private let bounds: Bounds
  private var segments: [MetadataKey: SegmentID] = [:]
  private var unreachable: [String: String] = [:]
  private(set) var sources: [String: GetResult.Source] = [:]
  /// Where each shard came from.
  private(set) var origins: [SharedDocument.Location?]

  private static let windowCount = 8
  private static let attemptMilliseconds: UInt64 = 10_000
  private static let openMilliseconds: UInt64 = 2000

  private struct Flight {
    let shard: Int
    let location: SharedDocument.Location
    let batch: BatchID
  }

  init(
    _ engine: TransferEngine, _ workers: WorkerPool, _ document: SharedDocument,
    into layout: BufferLayout, _ bounds: Bounds
  ) {
    self.engine = engine
    self.workers = workers
    self.document = document
    self.layout = layout
    self.bounds = bounds
    origins = Array(repeating: nil, count: document.shards.count)
  }

  /// Fetches all shards, or those given.
  mutating func run(_ shards: [Int]) throws(EngineError) {
    defer { for segment in segments.values { try? engine.closeSegment(segment) } }
    var waiting = shards.map { shard in
      (
        shard: shard,
        locations: document.shards[shard].replicas.shuffled()
          + document.shards[shard].gold.shuffled()
      )
    }
    waiting.reverse()
    var flights: [Flight] = []
    var doneCount = 0
    defer {
      for flight in flights { try? engine.cancel(flight.batch) }
      for flight in flights {
        _ = try? engine.wait(flight.batch)
        try? engine.freeBatch(flight.batch)
      }
    }
    var left: [Int: [SharedDocument.Location]] = [:]
    while !waiting.isEmpty || !flights.isEmpty {
      try bounds.check("\(shards.count - doneCount) shards missing")
      while flights.count < Self.windowCount, var next = waiting.popLast() {
        try bounds.check("\(shards.count - doneCount) shards missing")
        guard let location = next.locations.popLast() else { throw exhausted(next.shard) }
        left[next.shard] = next.locations
        if let flight = try start(next.shard, location) {
          flights.append(flight)
        } else {
          waiting.append(next)
        }
      }
      if flights.isEmpty { continue }
      // The oldest is waited for; the others go on meanwhile.
      let flight = flights[0]
      guard
        let status = try? engine.wait(flight.batch, timeoutMilliseconds: 100),
        status.state.isTerminal
      else {
        try bounds.report(progress(doneCount, flights.count))
        continue
      }
      flights.removeFirst()
      let message = engine.failureMessage(of: flight.batch)
      try? engine.freeBatch(flight.batch)
      if status.state == .completed {
        note(flight)
        doneCount += 1
        try bounds.report(progress(doneCount, flights.count))
      } else {
        unreachable[flight.location.segment] = message
        waiting.append((flight.shard, left[flight.shard] ?? []))
      }
    }
  }

  private func progress(_ doneCount: Int, _ active: Int) -> StoreProgress {
    StoreProgress(
      phase: .transferring,
      doneBytes: min(document.size, UInt64(doneCount) * document.maxShardSize),
      totalBytes: document.size, activeHolderCount: min(active, segments.count),
      holderCount: segments.count)
  }

  private mutating func note(_ flight: Flight) {
    origins[flight.shard] = flight.location
    let segment = flight.location.segment
    let isGold = document.shards[flight.shard].gold.contains(flight.location)
    var source =
      sources[segment]
      ?? GetResult.Source(
        segment: segment, isOrigin: isGold, byteCount: 0, corruptShardCount: 0)
    source.byteCount += document.shards[flight.shard].size
    sources[segment] = source
  }

  /// Starts a read; nil if the location cannot be reached.
  private mutating func start(
    _ shard: Int, _ location: SharedDocument.Location
  ) throws(EngineError) -> Flight? {
    do throws(EngineError) {
      let segment = try segment(location.segment)
      let batch = try engine.createBatch(capacity: 1)
      let offset = document.offset(of: shard)
      let length = document.shards[shard].size
      do throws(EngineError) {
        guard let local = layout.address(of: offset, length: length) else {
          throw EngineError(.sizeMismatch, "shard \(shard) crosses the end of a buffer")
        }
        try engine.submit(
          batch, count: 1,
          timeoutMilliseconds: min(
            Self.attemptMilliseconds + length / 1_000_000,
            HolderConnection.milliseconds(until: bounds.deadline) &- 1) &+ 1,
          notification: nil
        ) { _ in
          RawRequest(
            opcode: Opcode.read.rawValue, segment: segment, source: local,
            targetOffset: location.offset, length: length)
        }
        return Flight(shard: shard, location: location, batch: batch)
      } catch {
        try? engine.freeBatch(batch)
        throw error
      }
    } catch {
      // This is no fault of the location's.
      if error.code == .canceled || bounds.isOver { throw error }
      unreachable[location.segment] = error.message
      return nil
    }
  }

  private mutating func segment(_ name: String) throws(EngineError) -> SegmentID {
    if let id = segments[MetadataKey(name)] { return id }
    let timeout =
      min(Self.openMilliseconds, HolderConnection.milliseconds(until: bounds.deadline) &- 1) &+ 1
    let opened = OpenedSegment()
    do throws(EngineError) {
      let id = try bounds.run(on: workers, "opening a segment") {
        [engine] () throws(EngineError) in
        let id = try engine.openSegment(name, timeoutMilliseconds: timeout)
        opened.set(id, engine)
        return id
      }
      segments[MetadataKey(name)] = id
      return id
    } catch {
      opened.abandon(engine)
      throw error
    }
  }

  private func exhausted(_ shard: Int) -> EngineError {
    let tried = unreachable.map { "\($0.key): \($0.value)" }.sorted()
    return EngineError(
      .noHolder,
      "payload '\(document.name)': no live holder of shard \(shard); tried: "
        + (tried.isEmpty ? "nobody, no location is listed" : tried.joined(separator: "; ")))
  }
}

/// A segment that a worker opens for a caller who may have given up by then.
private final class OpenedSegment: Sendable {
  private let state = Lock<(id: SegmentID?, isAbandoned: Bool)>((nil, false))

  func set(_ id: SegmentID, _ engine: TransferEngine) {
    let isAbandoned = state.withLock { state in
      state.id = id
      return state.isAbandoned
    }
    if isAbandoned { try? engine.closeSegment(id) }
  }

  func abandon(_ engine: TransferEngine) {
    let id = state.withLock { state in
      state.isAbandoned = true
      return state.id
    }
    if let id { try? engine.closeSegment(id) }
  }
}

extension P2PStore {
  private static let roundLimit = 5

  /// Fetches what the existing system registered and joins its replicas.
  func getUnverified(
    _ found: SharedCatalog.Found, _ options: GetOptions, _ bounds: Bounds, _ place: Placement,
    _ held: inout Catalog.Entry?, since start: UInt64
  ) throws(EngineError) -> GetResult {
    let document = found.document
    Log.info(
      "payload '\(document.name)' has no digests: it was registered by the existing system; its "
        + "bytes are not verified")
    let geometry = try Manifest(layout: document.layout, digests: [], isWritable: true)
    let (buffers, range, allocations) = try place(geometry)
    var entry = Catalog.Entry(
      name: document.name, isOrigin: false, holding: nil, layout: nil, allocations: allocations)
    do throws(EngineError) {
      let layout = try Self.layout(document.name, buffers, in: range, for: geometry)
      try memory.register(
        layout.ranges, location: options.location,
        access: options.sharesOnward ? .remoteRead : .local, bounds.call)
      entry.layout = layout
      let sources = try fetch(found, into: layout, bounds)
      if options.sharesOnward {
        let addresses = (0..<geometry.layout.shardCount).map { shard in
          let range = geometry.layout.range(ofShard: shard)
          return layout.address(of: range.offset, length: range.length)!
        }
        entry.isShared = true
        shared?.addReplica(document.name, segment: engine.name, addresses, bounds.call)
      }
      held = entry
      return GetResult(
        info: document.info, buffers: buffers, isVerified: false,
        nanoseconds: Clock.now() &- start, sources: sources)
    } catch {
      dissolve(entry, until: .after(milliseconds: 0), bounds.lastCall)
      throw error
    }
  }

  /// Reads until every shard came from a location that was still listed afterwards.
  private func fetch(
    _ first: SharedCatalog.Found, into layout: BufferLayout, _ bounds: Bounds
  ) throws(EngineError) -> [GetResult.Source] {
    var (document, revision) = first
    var shards = Array(document.shards.indices)
    var sources: [String: GetResult.Source] = [:]
    for _ in 0..<Self.roundLimit {
      var download = UnverifiedDownload(engine, workers, document, into: layout, bounds)
      try download.run(shards)
      sources.merge(download.sources) { first, second in
        var sum = first
        sum.byteCount += second.byteCount
        return sum
      }
      guard let (now, nowRevision) = try shared?.revised(document.name, bounds.call),
        now.isSamePayload(as: document)
      else {
        throw EngineError(
          .notFound, "payload '\(document.name)': it was replaced or removed while it was fetched")
      }
      if nowRevision == revision { shards = [] }
      // A location that is listed no longer may have been something else when it was read; so may
      // all where the same owner has registered the payload anew.
      let isContinued = document.isContinued(by: now)
      shards = shards.filter { shard in
        guard isContinued, let origin = download.origins[shard] else { return true }
        return !now.shards[shard].gold.contains(origin)
          && !now.shards[shard].replicas.contains(origin)
      }
      if shards.isEmpty { return sources.values.sorted { $0.byteCount > $1.byteCount } }
      if !isContinued { shards = Array(now.shards.indices) }
      (document, revision) = (now, nowRevision)
    }
    throw EngineError(
      .noHolder, "payload '\(document.name)': its holders change faster than it is read")
  }
}
