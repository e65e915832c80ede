import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// Fetches the shards of one payload. It runs on the caller's thread: it does what the plan says,
/// keeps reads in flight, verifies what has arrived and offers it to others. Workers open holders,
/// which blocks; no thread waits for a question to be answered.
final class PayloadDownload {
  /// What workers and answers report to the caller's thread.
  private enum News: Sendable {
    case opened(HolderConnection)
    case answered(HolderAddress, ShardAnswer)
    case failed(HolderAddress, MooncakeError)
    case discovered([HolderRecord])
    /// The version that the name has now, nil if none or not known, and more holders.
    case foundVersion(PayloadVersion?, [HolderRecord])
  }

  /// What a download asks the metadata service, within a call that ends with the download.
  struct Directory: Sendable {
    /// Some holders of the version.
    var holders: @Sendable (Call) throws(MooncakeError) -> [HolderRecord]
    /// The version that the name has; nil if the caller wants no other version.
    var present: (@Sendable (Call) throws(MooncakeError) -> PayloadVersion?)?
  }

  /// One shard that is being read.
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
    private static let callMilliseconds: UInt64 = 5000
    /// nil once the download has ended.
    private let news = Lock<[News]?>([])
    let event: EventFD
    /// Readable once the download has ended: calls for it end too.
    let ending: EventFD

    init() throws(Errno) {
      event = try EventFD()
      ending = try EventFD()
    }

    /// For a caller that keeps this inbox until the call ends.
    var call: Call {
      Call(
        until: .after(milliseconds: Self.callMilliseconds),
        cancellation: ending.descriptor.rawValue)
    }

    /// Returns false if the download has ended: the caller must give back what the item holds.
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

    /// Ends the inbox and returns what was left in it.
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
  /// Offers to others what has arrived; nil to offer nothing.
  private let holding: Holding?
  private let directory: Directory
  private let inbox: Inbox
  private let reader = UInt64.random(in: 1 ... .max)
  private var plan: DownloadPlan
  private var flights: [Flight] = []
  private var connections: [HolderAddress: HolderConnection] = [:]
  /// What the holder of the manifest has said; nil once an opening has begun with it.
  private var sourceIndex: (holder: HolderAddress, index: HolderConnection.Index)?
  /// The engine's latest count of partial arrivals from each segment.
  private var arrivals: [SegmentID: UInt64] = [:]
  private var sources: [String: GetResult.Source] = [:]
  /// Whether a holder speaks another version than this process.
  private var hasOtherVersions = false
  /// Holders that have sent shards without digests.
  private var trusted: Set<HolderAddress> = []
  private var doneBytes: UInt64 = 0
  /// Another version that the name has now.
  private var successor: PayloadVersion?
  private var isLooking = false
  private var lookCount: UInt64 = 0
  private var nextLook: UInt64 = 0

  private static let lookNanoseconds: UInt64 = 250_000_000
  private static let lookDoublingLimit: UInt64 = 3
  /// Longest wait between two checks of progress, cancellation and the plan.
  private static let tickMilliseconds: UInt64 = 100
  /// Reads of one holder that are waited for by an event descriptor.
  private static let awaitedLimit = 2
  /// Up to so many connections, none is closed before the end.
  private static let connectionLimit = 32

  init(
    _ engine: TransferEngine, _ workers: WorkerPool, _ search: ManifestSearch.Outcome,
    into layout: BufferLayout,
    holding: Holding?, holders: [HolderRecord], _ directory: Directory, _ bounds: Bounds
  ) throws(MooncakeError) {
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
      throw MooncakeError(.system, "making an event descriptor: \(error)")
    }
    plan = DownloadPlan(
      shardCount: manifest.layout.shardCount, shardBytes: manifest.layout.shardBytes,
      version: manifest.version, own: holding?.address, reader: reader, seed: reader)
    add(holders)
    for holder in search.silent { plan.expect(holder, answers: false, now: Clock.now()) }
    plan.expect(search.source, answers: true, now: Clock.now())
  }

  /// Returns when every shard has arrived and is verified. If it throws, no read is in flight.
  func run() throws(MooncakeError) -> [GetResult.Source] {
    defer { finish() }
    while !plan.isComplete {
      try bounds.check("\(plan.missingCount) of \(manifest.layout.shardCount) shards missing")
      try bounds.report(.transferring, progress)
      if engine.isClosing {
        throw MooncakeError(.canceled, "getting a payload: the engine was destroyed")
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

  private func noHolder() -> MooncakeError {
    let corrupt = plan.corrupt
    var tried = plan.tried.filter { item in !corrupt.contains { $0.holder == item.holder } }
      .map { "\($0.holder.segment) at \($0.holder.rpc): \($0.reason)" }
    tried += plan.useless.map { "\($0.segment) at \($0.rpc): it answers, but grants none of them" }
    let missing = "\(plan.missingCount) of \(manifest.layout.shardCount) shards"
    let wrong = corrupt.map {
      "\($0.holder.segment) at \($0.holder.rpc): sent shard \($0.shard) with a wrong digest"
    }
    if !wrong.isEmpty && (tried.isEmpty || corrupt.contains { plan.isOrigin($0.holder) }) {
      return MooncakeError(
        .digestMismatch,
        "the bytes are not those that were published: \(wrong.joined(separator: "; ")); nobody "
          + "else has the \(missing) that are missing: the payload was changed after it was "
          + "published, or the holder's memory is broken: publish it again"
          + (tried.isEmpty ? "" : "; tried too: " + tried.joined(separator: "; ")))
    }
    tried += wrong
    return MooncakeError(
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
    // Reads of one holder end in the order in which they began, so the first ones are enough: a
    // descriptor for each would be many.
    var awaited: [SegmentID: Int] = [:]
    for index in flights.indices {
      let segment = flights[index].connection.segment
      if awaited[segment, default: 0] == Self.awaitedLimit { continue }
      awaited[segment, default: 0] += 1
      if flights[index].event < 0 {
        flights[index].event = (try? engine.eventDescriptor(of: flights[index].batch)) ?? -1
      }
      items.append(pollfd(fd: flights[index].event, events: Int16(POLLIN), revents: 0))
    }
    let until = min(
      min(bounds.deadline, .after(milliseconds: Self.tickMilliseconds)),
      Deadline(nanoseconds: plan.wakeTime))
    // An interruption by a signal counts as a tick.
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

  /// Asks whether the name has another version by now, and for more holders of this one, because
  /// no known holder has what is missing.
  private func lookForSuccessor(_ now: UInt64) {
    guard !isLooking, now >= nextLook, let present = directory.present else { return }
    isLooking = true
    nextLook = now &+ Self.lookNanoseconds << min(lookCount, Self.lookDoublingLimit)
    lookCount += 1
    let isAccepted = workers.run { [inbox, directory, manifest] in
      let call = inbox.call
      let version = try? present(call)
      let isOther = version.map { $0 != manifest.version } ?? false
      let holders = isOther ? (try? directory.holders(call)) ?? [] : []
      _ = inbox.put(.foundVersion(version, holders))
    }
    if !isAccepted { isLooking = false }
  }

  private func ask(
    _ holder: HolderAddress, _ request: ShardRequest, _ milliseconds: UInt64
  ) {
    // The time counts from when it is sent: a worker may have come to it late.
    let question: @Sendable () -> Void = { [engine, manifest, inbox, reader] in
      let deadline = Deadline.after(milliseconds: milliseconds)
      StoreService.ask(engine, holder, request, until: deadline) { result in
        switch result {
        case .success(let answer):
          // The download may have ended meanwhile; then its grants are given back.
          if !inbox.put(.answered(holder, answer)) {
            Self.sendFarewell(to: holder, manifest, reader, engine)
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
    assert(!flights.contains { $0.shard == shard }, "two reads into the memory of shard \(shard)")
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
    do throws(MooncakeError) {
      let batch = try engine.createBatch(capacity: 1)
      do throws(MooncakeError) {
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
    case .foundVersion(let version, let records):
      isLooking = false
      // Holders that were not asked yet are tried first.
      add(records)
      successor = version == manifest.version ? nil : version
    }
  }

  /// Closes connections that are no longer used: a large swarm has many holders.
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

  private func checkFlights() throws(MooncakeError) {
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

  /// Counts whole slices that have arrived; part of a slice only shows that bytes come.
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

  private func end(_ flight: Flight, _ status: BatchStatus) throws(MooncakeError) {
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
    let isNew = plan.finished(
      flight.shard, from: holder, isIntact: isIntact, now: Clock.now())
    let isOrigin = plan.isOrigin(holder)
    var source =
      sources[holder.segment]
      ?? GetResult.Source(
        segment: holder.segment, isOrigin: isOrigin, byteCount: 0, corruptShardCount: 0)
    source.byteCount += range.length
    if !isIntact { source.corruptShardCount += 1 }
    sources[holder.segment] = source
    if isIntact && isNew {
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
  ) throws(MooncakeError) -> Bool {
    let digest = try Digest(of: bytes) { () throws(MooncakeError) in
      try bounds.check("verifying shard \(shard)")
      try bounds.report(.transferring, progress)
    }
    return digest == manifest.digests[shard]
  }

  /// Cancels what is in flight and waits for its end, so that no more bytes arrive, and gives
  /// everything back.
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
      Self.sendFarewell(to: holder, manifest, reader, engine)
    }
    for connection in connections.values { connection.close(engine) }
  }

  private static func sendFarewell(
    to holder: HolderAddress, _ manifest: Manifest, _ reader: UInt64, _ engine: TransferEngine
  ) {
    let request = ShardRequest.farewell(
      to: holder, version: manifest.version, reader: reader,
      shardCount: manifest.layout.shardCount)
    StoreService.tell(engine, holder, request)
  }
}
