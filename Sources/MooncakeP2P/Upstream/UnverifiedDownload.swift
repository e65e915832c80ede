import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

/// Fetches a payload that Mooncake's store registered: no digests, and a list of locations per
/// shard. Several shards are read at once; each is tried at all of its locations.
package struct UnverifiedDownload {
  package struct Settings: Sendable {
    /// Shards read at the same time.
    package var windowCount = 8
    /// A segment that sends nothing for this long has failed.
    package var silenceMilliseconds: UInt64 = 10_000
    package var openMilliseconds: UInt64 = 2000
    /// How often a shard whose read began and broke off is read from one location.
    package var attemptLimit = 3

    package init() {}
  }

  private let engine: TransferEngine
  private let workers: WorkerPool
  private let document: UpstreamDocument
  private let layout: BufferLayout
  private let bounds: Bounds
  private let settings: Settings
  private var segments: [MetadataKey: SegmentID] = [:]
  /// Segments whose last read failed, and why.
  private var failed: [String: String] = [:]
  private var flights: [Flight] = []
  private var doneCount = 0
  package private(set) var sources: [String: GetResult.Source] = [:]
  /// Where each shard came from.
  package private(set) var origins: [UpstreamDocument.Location?]

  /// A missing shard, and the locations still to be tried.
  private struct MissingShard {
    let shard: Int
    var locations: [UpstreamDocument.Location]
    /// How often its bytes began to arrive and broke off.
    var breaks = 0
  }

  private struct Flight {
    var missing: MissingShard
    let location: UpstreamDocument.Location
    let segment: SegmentID
    let batch: BatchID
    var watch: ArrivalWatch
    var isSilent = false
  }

  private static let tickMilliseconds: UInt64 = 50

  package init(
    _ engine: TransferEngine, _ workers: WorkerPool, _ document: UpstreamDocument,
    into layout: BufferLayout, _ bounds: Bounds, _ settings: Settings = Settings()
  ) {
    self.engine = engine
    self.workers = workers
    self.document = document
    self.layout = layout
    self.bounds = bounds
    self.settings = settings
    origins = Array(repeating: nil, count: document.shards.count)
  }

  /// Fetches all shards, or those given.
  package mutating func run(_ shards: [Int]) throws(MooncakeError) {
    defer { finish() }
    // They are taken from the end.
    var waiting = shards.reversed().map { shard in
      let shardPlaces = document.shards[shard]
      return MissingShard(
        shard: shard, locations: shardPlaces.replicas.shuffled() + shardPlaces.gold.shuffled())
    }
    while !waiting.isEmpty || !flights.isEmpty {
      while flights.count < settings.windowCount, let missing = waiting.popLast() {
        try bounds.check("\(shards.count - doneCount) shards missing")
        if let again = try start(missing) { waiting.append(again) }
      }
      try bounds.check("\(shards.count - doneCount) shards missing")
      try bounds.report(.transferring, progress(doneCount, flights.count))
      guard let oldest = flights.first else { continue }
      // Opening a segment blocks, but the reads in flight go on.
      let left = HolderConnection.milliseconds(until: bounds.deadline)
      _ = try? engine.wait(
        oldest.batch, timeoutMilliseconds: min(left, Self.tickMilliseconds))
      waiting += checkFlights()
    }
  }

  /// Ends all reads in flight, so that no byte arrives any more, and releases their batches.
  private mutating func finish() {
    for flight in flights { try? engine.cancel(flight.batch) }
    for flight in flights {
      _ = try? engine.wait(flight.batch)
      try? engine.freeBatch(flight.batch)
    }
    flights = []
    for segment in segments.values { try? engine.closeSegment(segment) }
    segments = [:]
  }

  /// Collects reads that have ended and cancels silent ones. Returns the shards that are still
  /// missing.
  private mutating func checkFlights() -> [MissingShard] {
    // Reads of one segment share its connections, so one may wait behind another's bytes.
    var latest: [SegmentID: UInt64] = [:]
    for index in flights.indices {
      _ = flights[index].watch.hasArrived(engine)
      let flight = flights[index]
      latest[flight.segment] = max(latest[flight.segment] ?? 0, flight.watch.lastArrival)
    }
    var missing: [MissingShard] = []
    var index = 0
    while index < flights.count {
      let flight = flights[index]
      if let status = try? engine.poll(flight.batch), !status.state.isTerminal {
        let others = latest[flight.segment] ?? 0
        if !flight.isSilent
          && flight.watch.isSilent(for: settings.silenceMilliseconds, others: others)
        {
          flights[index].isSilent = true
          try? engine.cancel(flight.batch)
        }
        index += 1
        continue
      }
      flights.remove(at: index)
      if let shard = end(flight) { missing.append(shard) }
    }
    return missing
  }

  /// Returns the shard if it must be read again.
  private mutating func end(_ flight: Flight) -> MissingShard? {
    let status = try? engine.poll(flight.batch)
    let message = engine.failureMessage(of: flight.batch)
    try? engine.freeBatch(flight.batch)
    if status?.state == .completed {
      note(flight)
      doneCount += 1
      return nil
    }
    failed[flight.location.segment] =
      flight.isSilent ? "it sent nothing for \(settings.silenceMilliseconds) ms" : message
    var missing = flight.missing
    let isRefused = [.notRegistered, .accessDenied].contains(status?.error)
    if flight.watch.hasBytes && !isRefused && missing.breaks + 1 < settings.attemptLimit {
      missing.breaks += 1
      missing.locations.insert(flight.location, at: 0)
    }
    return missing
  }

  private func progress(_ doneCount: Int, _ active: Int) -> StoreProgress {
    StoreProgress(
      phase: .transferring,
      doneBytes: min(document.size, UInt64(doneCount) * document.maxShardSize),
      totalBytes: document.size, activeHolderCount: min(active, segments.count),
      holderCount: segments.count)
  }

  private mutating func note(_ flight: Flight) {
    origins[flight.missing.shard] = flight.location
    let (segment, shard) = (flight.location.segment, flight.missing.shard)
    failed[segment] = nil
    let isGold = document.shards[shard].gold.contains(flight.location)
    var source =
      sources[segment]
      ?? GetResult.Source(
        segment: segment, isOrigin: isGold, byteCount: 0, corruptShardCount: 0)
    source.byteCount += document.shards[shard].size
    sources[segment] = source
  }

  /// Starts a read from the last location, preferring segments that have not failed. Returns the
  /// shard if the location cannot be reached.
  private mutating func start(_ missing: MissingShard) throws(MooncakeError) -> MissingShard? {
    var missing = missing
    guard
      let index = missing.locations.lastIndex(where: { failed[$0.segment] == nil })
        ?? missing.locations.indices.last
    else { throw exhausted(missing.shard) }
    let location = missing.locations.remove(at: index)
    do throws(MooncakeError) {
      let segment = try segment(location.segment)
      let batch = try engine.createBatch(capacity: 1)
      do throws(MooncakeError) {
        try submit(batch, missing.shard, location, segment)
      } catch {
        try? engine.freeBatch(batch)
        throw error
      }
      flights.append(
        Flight(
          missing: missing, location: location, segment: segment, batch: batch,
          watch: ArrivalWatch(engine, batch, from: segment)))
      return nil
    } catch {
      // Not the location's fault.
      if error.code == .canceled || bounds.isOver { throw error }
      failed[location.segment] = error.message
      return missing
    }
  }

  private func submit(
    _ batch: BatchID, _ shard: Int, _ location: UpstreamDocument.Location, _ segment: SegmentID
  ) throws(MooncakeError) {
    let length = document.shards[shard].size
    guard let local = layout.address(of: document.offset(of: shard), length: length) else {
      throw MooncakeError(.sizeMismatch, "shard \(shard) crosses the end of a buffer")
    }
    // Never times out by itself: the arrival of bytes decides whether it has failed.
    try engine.submit(batch, count: 1, timeoutMilliseconds: .max, notification: nil) { _ in
      RawRequest(
        opcode: Opcode.read.rawValue, segment: segment, source: local,
        targetOffset: location.offset, length: length)
    }
  }

  private mutating func segment(_ name: String) throws(MooncakeError) -> SegmentID {
    if let id = segments[MetadataKey(name)] { return id }
    let timeout = min(
      settings.openMilliseconds, HolderConnection.milliseconds(until: bounds.deadline))
    let opened = OpenedSegment()
    do throws(MooncakeError) {
      let id = try bounds.run(on: workers, "opening a segment") {
        [engine] () throws(MooncakeError) in
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

  private func exhausted(_ shard: Int) -> MooncakeError {
    let tried = failed.map { "\($0.key): \($0.value)" }.sorted()
    return MooncakeError(
      .noHolder,
      "payload '\(document.name)': no live holder of shard \(shard); tried: "
        + (tried.isEmpty ? "nobody, no location is listed" : tried.joined(separator: "; ")))
  }
}

/// A segment opened by a worker for a caller that may have given up by then.
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

  /// Fetches what Mooncake's store registered and joins its replicas.
  func getUnverified(
    _ found: UpstreamCatalog.Found, _ options: GetOptions, _ bounds: Bounds, _ place: Placement,
    _ held: inout Catalog.Entry?, since start: UInt64
  ) throws(MooncakeError) -> GetResult {
    let document = found.document
    Log.info(
      "payload '\(document.name)' has no digests: it was registered by Mooncake's store; its "
        + "bytes are not verified")
    let geometry = try Manifest(layout: document.layout, digests: [], isWritable: true)
    let (buffers, range, allocations) = try place(geometry)
    var entry = Catalog.Entry(
      name: document.name, isOrigin: false, holding: nil, layout: nil, allocations: allocations)
    do throws(MooncakeError) {
      let layout = try Self.layout(document.name, buffers, in: range, for: geometry)
      try memory.register(
        layout.ranges, location: options.location,
        access: options.sharesOnward ? .remoteRead : .local, bounds.call, leaving: &entry.ending)
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
      let failure = undo(&entry, error, bounds)
      if !entry.ending.isEmpty { held = entry }
      throw failure
    }
  }

  /// Reads until every shard came from a location that was still listed afterwards.
  private func fetch(
    _ first: UpstreamCatalog.Found, into layout: BufferLayout, _ bounds: Bounds
  ) throws(MooncakeError) -> [GetResult.Source] {
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
        throw MooncakeError(
          .notFound, "payload '\(document.name)': it was replaced or removed while it was fetched")
      }
      if nowRevision == revision { shards = [] }
      // A location that is no longer listed may have held something else when it was read. So may
      // all of them if the same owner has registered the payload anew.
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
    throw MooncakeError(
      .noHolder, "payload '\(document.name)': its holders change faster than it is read")
  }
}
