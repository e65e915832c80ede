import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport

/// A peer as the metadata would name it: its present life, and the places where it is reached.
final class FakeTarget: @unchecked Sendable {
  // Unchecked: a simulation has one thread.
  let number: Int
  let name: String
  var process: FakeProcess
  /// In order of preference.
  var places: [FakePlace]
  var segment: SegmentID = 0

  init(_ number: Int, process: FakeProcess, places: [FakePlace]) {
    self.number = number
    name = "peer\(number)"
    self.process = process
    self.places = places
  }
}

/// An engine's place: a router with fake paths, on a virtual clock, driven by one seed.
final class FakeNetwork: RouterHost, BatchAnnouncer, @unchecked Sendable {
  // Unchecked: a simulation has one thread.
  let time = VirtualTime()
  private var random: SeededRandom
  let router: Router
  let model: MemoryModel
  private(set) var helper: FakeCopyQueue!
  private var drivers: [FakeDriver] = []
  private(set) var peers: [FakeTarget] = []
  private(set) var streams: [FakeStreamPath] = []
  private(set) var memories: [FakeMemoryPath] = []
  private(set) var batches: [Batch] = []
  private(set) var isClosed = false
  let isTraced: Bool

  // How fetching a descriptor goes, in percent and nanoseconds.
  var failedRefreshes = 0
  var refusedThreads = 0
  var hungRefreshes = 0
  private var refreshDepth = 0
  private(set) var refreshCount = 0

  /// A sweep comes at its time; reads that drain and recoveries that are looked at together add to
  /// that.
  static let lateness: UInt64 = 13_000_000

  init(seed: UInt64, isTraced: Bool = false) {
    self.isTraced = isTraced
    random = SeededRandom(seed: seed)
    model = MemoryModel(lateness: Self.lateness)
    let time = time
    router = Router(
      local: LocalSegment(identity: SegmentDescriptor(name: "self")), spinNanoseconds: 0,
      clock: { time.now })
    router.host = self
    helper = FakeCopyQueue(self)
    // Number 0 is the engine's own.
    let own = SegmentRoute(descriptor: SegmentDescriptor(name: "self"), paths: [])
    _ = try? router.segments.insert("self", route: own)
    time.afterEach = { [unowned self] in model.check(self.time.now) }
  }

  deinit {
    time.end()
    for driver in drivers { driver.end() }
    helper.end()
  }

  func draw(below limit: Int) -> Int { random.next(below: limit) }

  func chance(_ percent: Int) -> Bool { percent > 0 && draw(below: 100) < percent }

  func trace(_ text: @autoclosure () -> String) {
    if isTraced { print("\(time.now / 1000 - 1_000_000) us: \(text())") }
  }

  func makeDriver() -> FakeDriver {
    drivers.append(FakeDriver(self))
    return drivers.last!
  }

  // MARK: Peers

  func addPeer(places: [FakePlace], buffers: [Range<Int>] = [0..<FakeProcess.cellCount])
    -> FakeTarget
  {
    let process = FakeProcess(incarnation: UInt64(100 + peers.count * 10), buffers: buffers)
    let peer = FakeTarget(peers.count, process: process, places: places)
    peers.append(peer)
    model.processes.append([process])
    let route = route(to: peer, former: [])
    peer.segment = (try? router.segments.insert(peer.name, route: route).segment.id) ?? -1
    return peer
  }

  private func route(to peer: FakeTarget, former: [any Path]) -> SegmentRoute {
    let link = peer.segment <= 0 ? SegmentLink(peer.name, router) : link(of: peer)
    let paths = peer.places.map { place -> any Path in
      for case let path as FakeStreamPath in former
      where path.place === place && path.process === peer.process { return path }
      for case let path as FakeMemoryPath in former
      where path.place === place && path.process === peer.process { return path }
      switch place.kind {
      case .stream:
        streams.append(FakeStreamPath(place, peer.process, link: link, network: self))
        return streams.last!
      case .memory:
        memories.append(FakeMemoryPath(place, peer.process, link: link, network: self))
        return memories.last!
      }
    }
    return SegmentRoute(
      descriptor: peer.process.describe(peer.name), paths: paths, link: link)
  }

  private func link(of peer: FakeTarget) -> SegmentLink {
    (try? router.segments.segment(peer.segment))?.route.link ?? SegmentLink(peer.name, router)
  }

  /// The process ends and another takes its name.
  func restart(_ peer: FakeTarget) {
    trace("\(peer.name) restarts")
    let old = peer.process
    old.isAlive = false
    peer.process = FakeProcess(incarnation: old.incarnation + 1, buffers: old.buffers)
    model.processes[peer.number].append(peer.process)
    for path in streams where path.process === old { path.processEnded() }
    for path in memories where path.process === old { path.processEnded() }
  }

  func goDown(_ place: FakePlace, for nanoseconds: UInt64) {
    trace("\(place.name) goes down for \(nanoseconds / 1000) us")
    let until = time.now + nanoseconds
    place.downUntil = until
    for path in streams where path.place === place { path.goDown(until: until) }
    for path in memories where path.place === place { path.goDown(until: until) }
  }

  // MARK: The router's host

  func refresh(_ segment: OpenSegment, until deadline: Deadline) throws(MooncakeError) {
    refreshCount += 1
    // Other things happen meanwhile.
    if refreshDepth < 3 {
      refreshDepth += 1
      var end = time.now + UInt64(draw(below: 2_000_000))
      if chance(hungRefreshes) { end += 100_000_000 }
      end = min(end, max(deadline.nanoseconds, time.now))
      // Closing the engine ends it.
      while time.now < end, !isClosed { time.run(until: min(end, time.now + 1_000_000)) }
      refreshDepth -= 1
    }
    if chance(failedRefreshes) || time.now >= deadline.nanoseconds {
      throw MooncakeError(.unreachable, "the peer does not answer")
    }
    guard let peer = peers.first(where: { $0.name == segment.name }) else {
      throw MooncakeError(.notFound, "no such peer")
    }
    refresh(peer, segment)
  }

  /// What the engine does with a descriptor that it has fetched.
  func refresh(_ peer: FakeTarget, _ segment: OpenSegment) {
    let old = segment.route
    let route = route(to: peer, former: old.paths)
    trace("\(peer.name) is refreshed: \(route.paths.map(\.description))")
    guard segment.replaceRoute(old, with: route) else { return }
    let isRestarted = peer.process.incarnation != old.descriptor.incarnation
    for path in old.paths where !route.paths.contains(where: { $0 === path }) {
      path.retire(
        successor: PathSuccessor(isRestarted: isRestarted) { [weak router, weak segment] slice in
          guard let router, let segment else {
            return Batch.end(slice, .canceled, reason: "segment closed mid-transfer")
          }
          router.resubmit(segment, slice)
        })
    }
  }

  func runInBackground(_ body: @escaping @Sendable () -> Void) -> Bool {
    if chance(refusedThreads) { return false }
    time.after(UInt64(draw(below: 100_000)), body)
    return true
  }

  func run(at deadline: Deadline, _ body: @escaping @Sendable () -> Void) {
    if deadline != .never { time.at(deadline.nanoseconds, body) }
  }

  func announce(_ batch: Batch) {}
  func deliver(_ notification: Batch.PendingNotification, of batch: Batch) {}
  func run(_ callback: @escaping Batch.Callback, of batch: Batch, status: BatchStatus) {}

  // MARK: Transfers

  struct Request {
    var opcode: Opcode
    var peer: FakeTarget
    /// Cells of the target.
    var cells: Range<Int>
  }

  func makeBatch(_ capacity: Int) -> Batch {
    let batch = Batch(
      capacity: capacity, pool: router.pool, drivers: router.drivers, announcer: self)
    batches.append(batch)
    return batch
  }

  /// Returns the requests' numbers in the model; none if the submit was refused.
  @discardableResult
  func submit(
    _ requests: [Request], to batch: Batch, within nanoseconds: UInt64, isAsynchronous: Bool = true
  ) -> [Int] {
    let deadline = time.now + nanoseconds
    let first = batch.submittedCount
    var raws: [RawRequest] = []
    var numbers: [Int] = []
    for (index, request) in requests.enumerated() {
      let local = model.reserve(request.cells.count)
      let number = model.add(
        MemoryModel.Request(
          batch: batch, index: first + index, opcode: request.opcode, peer: request.peer.number,
          local: local, remote: request.cells, submitted: model.makeOrder(), submitTime: time.now,
          deadline: deadline))
      numbers.append(number)
      trace("submits \(request.opcode) \(number) of \(request.peer.name) \(request.cells)")
      raws.append(
        RawRequest(
          opcode: request.opcode.rawValue, segment: request.peer.segment,
          source: Cells.localBase + UInt64(local.lowerBound * Cells.bytes),
          targetOffset: Cells.remoteAddress(request.cells.lowerBound),
          length: UInt64(request.cells.count * Cells.bytes)))
    }
    do {
      try router.whileOpen { () throws(MooncakeError) in
        try router.submit(
          batch, count: raws.count, deadline: deadline, notification: nil,
          isAsynchronous: isAsynchronous, isObserved: false
        ) { raws[$0] }
      }
    } catch {
      trace("is refused: \(error)")
      model.removeLast(raws.count)
      return []
    }
    if !isAsynchronous { drive(batch) }
    return numbers
  }

  /// A thread waits for the batch.
  private func drive(_ batch: Batch) {
    if batch.isTerminal { return }
    router.drivePolled(batch)
    time.after(100_000) { [unowned self] in drive(batch) }
  }

  func cancel(_ batch: Batch) {
    if batch.isTerminal { return }
    trace("cancels")
    model.noteCancel(batch, time.now)
    batch.requestCancel()
    router.drivers.requestSweeps()
    router.endCanceledRecoveries()
  }

  func closeSegment(of peer: FakeTarget) {
    guard let segment = try? router.segments.release(peer.segment) else { return }
    trace("closes \(peer.name)")
    for path in segment.close().paths { path.retire(successor: nil) }
  }

  func close() {
    trace("closes")
    isClosed = true
    for batch in batches where !batch.isTerminal { model.noteCancel(batch, time.now) }
    router.close {}
    for path in streams { path.shutDown() }
    for path in memories { path.shutDown() }
  }

  /// Lets everything end, and what may still land after its end; checks that it has.
  func finish() {
    let isOver = time.runAll(until: time.now + 100_000_000_000) { model.violations.isEmpty }
    if !isOver && model.violations.isEmpty { model.fail("something goes on for ever") }
    if !model.violations.isEmpty { return }
    model.check(time.now)
    if !model.isQuiet { model.fail("a request has never ended") }
    for path in streams where !path.isEmpty || path.load != 0 {
      model.fail("\(path.description) keeps slices or counts \(path.load) bytes")
    }
    for path in memories where !path.isEmpty || path.load != 0 {
      model.fail("\(path.description) keeps slices or counts \(path.load) bytes")
    }
    for batch in batches { checkStatus(of: batch) }
  }

  private func checkStatus(of batch: Batch) {
    if batch.submittedCount == 0 { return }
    let status = batch.status
    let mine = model.requests.filter { $0.batch === batch }
    let completed = mine.filter { $0.outcome == .completed }
    let byteCount = mine.reduce(0) {
      $0 + batch.status(of: $1.index).transferredBytes
    }
    if !status.state.isTerminal || status.terminalCount != UInt64(mine.count)
      || status.completedCount != UInt64(completed.count) || status.transferredBytes != byteCount
      || (status.state == .completed) != (completed.count == mine.count)
    {
      model.fail("a batch's status does not add up: \(status)")
    }
    if status.state != .completed && batch.failureMessage.isEmpty {
      model.fail("a batch failed without a reason")
    }
  }
}
