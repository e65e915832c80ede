import Glibc
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Fetches the shards of one payload. The caller's thread runs it: it does what the plan says,
/// keeps reads in flight, verifies what has arrived and offers it. Opening holders, which blocks,
/// is left to workers; no thread waits for a question to be answered.
final class PayloadDownload {
  /// What workers have found out.
  private enum News: Sendable {
    case opened(HolderConnection)
    case answered(HolderAddress, ShardAnswer)
    case failed(HolderAddress, EngineError)
    case discovered([HolderRecord])
    /// What the name has now, nil for nothing or where that is not known, and more holders.
    case looked(PayloadVersion?, [HolderRecord])
  }

  /// Where a download turns to the metadata service, within a call that ends with the download.
  struct Directory: Sendable {
    /// Some holders of the version.
    var holders: @Sendable (MetadataCall) throws(EngineError) -> [HolderRecord]
    /// The version that stands under the name; nil: whoever gets this wants no other.
    var present: (@Sendable (MetadataCall) throws(EngineError) -> PayloadVersion?)?
  }

  /// One shard on its way.
  private struct Flight {
    let shard: Int
    let connection: HolderConnection
    let batch: BatchID
    /// -1 until it is waited for.
    var event: Int32 = -1
    var seenBytes: UInt64 = 0
    var isCanceled = false
  }

  private final class Inbox: Sendable {
    /// nil once nobody takes them any more.
    private let news = Lock<[News]?>([])
    let event: EventFD
    /// Readable once nobody takes news any more: what would bring some ends.
    let ending: EventFD

    init() throws(Errno) {
      event = try EventFD()
      ending = try EventFD()
    }

    /// For whoever keeps this inbox meanwhile.
    var call: MetadataCall {
      MetadataCall(
        until: .after(milliseconds: 5000), cancellation: ending.descriptor.rawValue)
    }

    /// Returns false if what the news holds is the caller's to give back.
    func put(_ item: News) -> Bool {
      let isTaken = news.withLock { news in
        news?.append(item)
        return news != nil
      }
      event.signal()
      return isTaken
    }

    func take() -> [News] {
      event.clear()
      return news.withLock { news in
        defer { news = [] }
        return news ?? []
      }
    }

    var isClosed: Bool { news.withLock { $0 == nil } }

    /// Takes the last ones.
    func close() -> [News] {
      ending.signal()
      return news.withLock { news in
        defer { news = nil }
        return news ?? []
      }
    }
  }

  private let engine: TransferEngine
  private let workers: WorkerPool
  private let manifest: Manifest
  private let layout: BufferLayout
  private let bounds: Bounds
  /// Where what has arrived is offered; nil to offer nothing.
  private let holding: Holding?
  private let directory: Directory
  private let inbox: Inbox
  private let reader = UInt64.random(in: 1 ... .max)
  private var plan: DownloadPlan
  private var flights: [Flight] = []
  private var connections: [HolderAddress: HolderConnection] = [:]
  /// What the holder of the manifest has said; nil once its connection was opened with it.
  private var sourceIndex: (holder: HolderAddress, index: HolderConnection.Index)?
  /// What the engine last said of parts of answers.
  private var arrivals: [SegmentID: UInt64] = [:]
  private var sources: [String: GetResult.Source] = [:]
  /// Whether a holder speaks another version than this process.
  private var hasOtherVersions = false
  /// Who has sent shards that no digest covers.
  private var trusted: Set<HolderAddress> = []
  private var doneBytes: UInt64 = 0
  /// Another version that the name has now.
  private var successor: PayloadVersion?
  private var isLooking = false
  private var lookCount: UInt64 = 0
  private var nextLook: UInt64 = 0

  private static let lookNanoseconds: UInt64 = 250_000_000
  /// Longest wait between two looks at progress, cancellation and the plan.
  private static let tickMilliseconds: UInt64 = 100
  private static let awaitedPerHolder = 2
  /// Connections that are kept whoever they lead to.
  private static let connectionLimit = 32

  init(
    _ engine: TransferEngine, _ workers: WorkerPool, _ search: ManifestSearch.Outcome,
    into layout: BufferLayout,
    holding: Holding?, holders: [HolderRecord], _ directory: Directory, _ bounds: Bounds
  ) throws(EngineError) {
    self.engine = engine
    self.workers = workers
    let manifest = search.manifest
    self.manifest = manifest
    sourceIndex = (search.source, search.sourceIndex)
    self.layout = layout
    self.holding = holding
    self.bounds = bounds
    self.directory = directory
    do throws(Errno) { inbox = try Inbox() } catch {
      throw EngineError(.system, "making an event descriptor: \(error)")
    }
    plan = DownloadPlan(
      shardCount: manifest.layout.shardCount, shardBytes: manifest.layout.shardBytes,
      version: manifest.version, own: holding?.address, reader: reader, seed: reader)
    add(holders)
    for holder in search.silent { plan.expect(holder, answers: false, now: Clock.now()) }
    plan.expect(search.source, answers: true, now: Clock.now())
  }

  /// Returns when every shard is there and verified; throws otherwise, with no read in flight.
  func run() throws(EngineError) -> [GetResult.Source] {
    defer { finish() }
    while !plan.isComplete {
      try bounds.check("\(plan.missingCount) of \(manifest.layout.shardCount) shards missing")
      try bounds.report(.transferring, progress)
      if engine.isClosing {
        throw EngineError(.canceled, "getting a payload: the engine was destroyed")
      }
      let now = Clock.now()
      while let action = plan.next(now) { perform(action) }
      if plan.isStuck(now) && flights.isEmpty { throw noHolder() }
      if directory.present != nil && plan.lacksSource(now) && flights.isEmpty {
        if successor != nil { throw noHolder() }
        lookForSuccessor(now)
      }
      wait()
      for item in inbox.take() { note(item) }
      try checkFlights()
    }
    try HoldingCheck(
      engine: engine, manifest: manifest, reader: reader, bounds: bounds
    ).run(trusted)
    try bounds.report(.transferring, isLast: true, progress)
    return sources.values.sorted { $0.byteCount > $1.byteCount }
  }

  private var progress: StoreProgress {
    StoreProgress(
      phase: .transferring, doneBytes: doneBytes, totalBytes: manifest.layout.size,
      activeHolderCount: Set(flights.map(\.connection.holder)).count,
      holderCount: plan.holderCount)
  }

  private func noHolder() -> EngineError {
    let corrupt = plan.corrupt
    var tried = plan.tried.filter { item in !corrupt.contains { $0.holder == item.holder } }
      .map { "\($0.holder.segment) at \($0.holder.rpc): \($0.reason)" }
    tried += plan.useless.map { "\($0.segment) at \($0.rpc): it answers, but grants none of them" }
    let missing = "\(plan.missingCount) of \(manifest.layout.shardCount) shards"
    let wrong = corrupt.map {
      "\($0.holder.segment) at \($0.holder.rpc): sent shard \($0.shard) with a wrong digest"
    }
    if !wrong.isEmpty && (tried.isEmpty || corrupt.contains { plan.isOrigin($0.holder) }) {
      return EngineError(
        .digestMismatch,
        "the bytes are not those that were published: \(wrong.joined(separator: "; ")); nobody "
          + "else has the \(missing) that are missing: the payload was changed after it was "
          + "published, or the holder's memory is broken: publish it again"
          + (tried.isEmpty ? "" : "; tried too: " + tried.joined(separator: "; ")))
    }
    tried += wrong
    return EngineError(
      hasOtherVersions ? .unsupported : .noHolder,
      "no live holder for \(missing); tried: "
        + (tried.isEmpty ? "nobody, none is known" : tried.joined(separator: "; ")))
  }

  // MARK: Waiting

  private func wait() {
    var items = [
      pollfd(fd: inbox.event.descriptor.rawValue, events: Int16(POLLIN), revents: 0),
      pollfd(fd: bounds.cancellation, events: Int16(POLLIN), revents: 0),
      pollfd(fd: engine.closeEvent.descriptor.rawValue, events: Int16(POLLIN), revents: 0),
    ]
    // Those of one holder end in the order in which they began: a descriptor each would be many.
    var awaited: [SegmentID: Int] = [:]
    for index in flights.indices {
      let segment = flights[index].connection.segment
      if awaited[segment, default: 0] == Self.awaitedPerHolder { continue }
      awaited[segment, default: 0] += 1
      if flights[index].event < 0 {
        flights[index].event = (try? engine.eventDescriptor(of: flights[index].batch)) ?? -1
      }
      items.append(pollfd(fd: flights[index].event, events: Int16(POLLIN), revents: 0))
    }
    let until = min(
      min(bounds.deadline, .after(milliseconds: Self.tickMilliseconds)),
      Deadline(nanoseconds: plan.wakeTime))
    // An interruption is as good as a tick.
    _ = poll(&items, nfds_t(items.count), until.remainingMilliseconds)
  }

  // MARK: What the plan says

  private func perform(_ action: DownloadPlan.Action) {
    switch action {
    case .ask(let holder, let request, let milliseconds):
      ask(holder, request, milliseconds)
    case .read(let holder, let shard): read(shard, from: holder)
    case .cancel(let holder, let shard):
      for index in flights.indices
      where flights[index].shard == shard && flights[index].connection.holder == holder {
        flights[index].isCanceled = true
        try? engine.cancel(flights[index].batch)
      }
    case .leave(let holder, let request):
      StoreService.tell(engine, holder, request)
    case .discover:
      let isAccepted = workers.run { [inbox, directory] in
        _ = inbox.put(.discovered((try? directory.holders(inbox.call)) ?? []))
      }
      if !isAccepted { note(.discovered([])) }
    }
  }

  /// Asks whether the name has another version by now; who holds this one, too, since nobody that
  /// is known has more of it.
  private func lookForSuccessor(_ now: UInt64) {
    guard !isLooking, now >= nextLook, let present = directory.present else { return }
    isLooking = true
    nextLook = now &+ Self.lookNanoseconds << min(lookCount, 3)
    lookCount += 1
    let isAccepted = workers.run { [inbox, directory, manifest] in
      let call = inbox.call
      let version = try? present(call)
      let isOther = version.map { $0 != manifest.version } ?? false
      let holders = isOther ? (try? directory.holders(call)) ?? [] : []
      _ = inbox.put(.looked(version, holders))
    }
    if !isAccepted { isLooking = false }
  }

  private func ask(
    _ holder: HolderAddress, _ request: ShardRequest, _ milliseconds: UInt64
  ) {
    // Its time begins when it is sent: a worker may have come to it late.
    let question: @Sendable () -> Void = { [engine, manifest, inbox, reader] in
      let deadline = Deadline.after(milliseconds: milliseconds)
      StoreService.ask(engine, holder, request, until: deadline) { result in
        switch result {
        case .success(let answer):
          // The download may have ended meanwhile; the holder must not wait for us.
          if !inbox.put(.answered(holder, answer)) {
            Self.takeLeave(of: holder, manifest, reader, engine)
          }
        case .failure(let error): _ = inbox.put(.failed(holder, error))
        }
      }
    }
    if connections[holder] != nil { return question() }
    var known: HolderConnection.Index?
    if let source = sourceIndex, source.holder == holder {
      (known, sourceIndex) = (source.index, nil)
    }
    let recipient = HolderConnection.Recipient(isWaiting: { [inbox] in !inbox.isClosed })
    HolderConnection.open(
      engine, workers, holder, manifest, known: known,
      until: .after(milliseconds: milliseconds), for: recipient
    ) { [engine, inbox] result in
      switch result {
      case .success(let connection):
        if !inbox.put(.opened(connection)) { return connection.close(engine) }
        question()
      case .failure(let error): _ = inbox.put(.failed(holder, error))
      }
    }
  }

  private func read(_ shard: Int, from holder: HolderAddress) {
    let range = manifest.layout.range(ofShard: shard)
    guard let connection = connections[holder],
      let remote = connection.layout.address(of: range.offset, length: range.length),
      let local = layout.address(of: range.offset, length: range.length)
    else {
      plan.failed(
        shard, from: holder, reason: "its buffers do not hold whole shards", isDead: true,
        now: Clock.now())
      return
    }
    do throws(EngineError) {
      let batch = try engine.createBatch(capacity: 1)
      do throws(EngineError) {
        try engine.submit(
          batch, count: 1,
          timeoutMilliseconds: HolderConnection.milliseconds(until: bounds.deadline),
          notification: nil
        ) { _ in
          RawRequest(
            opcode: Opcode.read.rawValue, segment: connection.segment, source: local,
            targetOffset: remote, length: range.length)
        }
        flights.append(
          Flight(shard: shard, connection: connection, batch: batch))
      } catch {
        try? engine.freeBatch(batch)
        throw error
      }
    } catch {
      plan.failed(
        shard, from: holder, reason: error.message, isDead: false, now: Clock.now())
    }
  }

  // MARK: What has happened

  private func note(_ news: News) {
    let now = Clock.now()
    switch news {
    case .opened(let connection):
      if let former = connections.updateValue(connection, forKey: connection.holder) {
        former.close(engine)
      }
      closeIdle()
    case .answered(let holder, let answer): plan.answered(by: holder, answer, now: now)
    case .failed(let holder, let error):
      if error.code == .unsupported { hasOtherVersions = true }
      plan.askFailed(
        holder, reason: error.message, isGone: error.code == .notFound, now: now)
    case .discovered(let records):
      add(records)
      plan.discovered(now: now)
    case .looked(let version, let records):
      isLooking = false
      // Those that nobody has asked yet are tried first.
      add(records)
      successor = version == manifest.version ? nil : version
    }
  }

  /// Of the many holders of a large swarm, those that are not asked or read any more.
  private func closeIdle() {
    if connections.count <= Self.connectionLimit { return }
    let used = Set(flights.map(\.connection.holder)).union(plan.known)
    for (holder, connection) in connections where !used.contains(holder) {
      connections[holder] = nil
      connection.close(engine)
    }
  }

  private func add(_ records: [HolderRecord]) {
    for record in records where record.holder != holding?.address {
      plan.add(record.holder, isOrigin: record.isOrigin)
    }
  }

  private func checkFlights() throws(EngineError) {
    var index = 0
    while index < flights.count {
      let flight = flights[index]
      guard let status = try? engine.poll(flight.batch) else {
        flights.remove(at: index)
        continue
      }
      if !status.state.isTerminal {
        noteProgress(of: index)
        index += 1
        continue
      }
      flights.remove(at: index)
      defer { try? engine.freeBatch(flight.batch) }
      try end(flight, status)
    }
  }

  /// Slices that have arrived are counted; a part of one says only that bytes come.
  private func noteProgress(of index: Int) {
    let flight = flights[index]
    let connection = flight.connection
    let bytes = (try? engine.poll(flight.batch, request: 0))?.transferredBytes ?? 0
    let arrival = engine.partialArrivalCount(from: connection.segment)
    let isPartial = arrivals.updateValue(arrival, forKey: connection.segment) ?? arrival != arrival
    if bytes <= flight.seenBytes && !isPartial { return }
    flights[index].seenBytes = max(bytes, flight.seenBytes)
    plan.progressed(
      connection.holder, bytes: flights[index].seenBytes - flight.seenBytes, now: Clock.now())
  }

  private func end(_ flight: Flight, _ status: BatchStatus) throws(EngineError) {
    let holder = flight.connection.holder
    let range = manifest.layout.range(ofShard: flight.shard)
    guard status.state == .completed else {
      let message = engine.failureMessage(of: flight.batch)
      plan.failed(
        flight.shard, from: holder,
        reason: message.isEmpty ? "the read was \(status.state)" : message,
        isDead: !flight.isCanceled, now: Clock.now())
      return
    }
    let local = layout.address(of: range.offset, length: range.length)!
    let bytes = UnsafeRawBufferPointer(start: P2PStore.pointer(local), count: Int(range.length))
    let isIntact = manifest.isWritable ? true : try matches(bytes, flight.shard)
    if manifest.isWritable { trusted.insert(holder) }
    let isNews = plan.finished(
      flight.shard, from: holder, isIntact: isIntact, now: Clock.now())
    let isOrigin = plan.isOrigin(holder)
    var source =
      sources[holder.segment]
      ?? GetResult.Source(
        segment: holder.segment, isOrigin: isOrigin, byteCount: 0, corruptShardCount: 0)
    source.byteCount += range.length
    if !isIntact { source.corruptShardCount += 1 }
    sources[holder.segment] = source
    if isIntact && isNews {
      doneBytes += range.length
      holding?.offer(flight.shard)
    }
    if !isIntact {
      Log.warning(
        "payload version \(manifest.version): shard \(flight.shard) from \(holder.segment) does "
          + "not match its digest; this holder is avoided")
    }
  }

  private func matches(
    _ bytes: UnsafeRawBufferPointer, _ shard: Int
  ) throws(EngineError) -> Bool {
    let digest = try Digest(of: bytes) { () throws(EngineError) in
      try bounds.check("verifying shard \(shard)")
      try bounds.report(.transferring, progress)
    }
    return digest == manifest.digests[shard]
  }

  /// Ends what is in flight, so that no byte arrives any more, and gives everything back.
  private func finish() {
    for flight in flights { try? engine.cancel(flight.batch) }
    for flight in flights {
      _ = try? engine.wait(flight.batch)
      try? engine.freeBatch(flight.batch)
    }
    flights = []
    var reached = Set(connections.keys)
    for item in inbox.close() {
      guard case .opened(let connection) = item else { continue }
      reached.insert(connection.holder)
      connection.close(engine)
    }
    for holder in plan.holdersWithGrants where reached.contains(holder) {
      Self.takeLeave(of: holder, manifest, reader, engine)
    }
    for connection in connections.values { connection.close(engine) }
  }

  private static func takeLeave(
    of holder: HolderAddress, _ manifest: Manifest, _ reader: UInt64, _ engine: TransferEngine
  ) {
    let request = ShardRequest.farewell(
      to: holder, version: manifest.version, reader: reader,
      shardCount: manifest.layout.shardCount)
    StoreService.tell(engine, holder, request)
  }
}
