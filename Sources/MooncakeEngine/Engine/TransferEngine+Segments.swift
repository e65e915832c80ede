import MooncakeBase
import MooncakeSystem
import Synchronization

extension TransferEngine {
  /// Whether a name is this engine's. Compares bytes: Swift would call some different texts equal.
  package func isOwn(_ name: String) -> Bool { name.utf8.elementsEqual(self.name.utf8) }

  /// Finds a peer and fetches its descriptor. A known name keeps its id and gets a fresh
  /// descriptor.
  public func openSegment(
    _ name: String, timeoutMilliseconds: UInt64 = 0
  ) throws(MooncakeError) -> SegmentID {
    try checkOpen()
    let name = String(name.drop { $0 == "/" })
    if name.isEmpty { throw MooncakeError(.invalidArgument, "the segment name is empty") }
    if isOwn(name) { return 0 }
    return try logged { () throws(MooncakeError) in
      try openRemote(name, call(until: deadline(timeoutMilliseconds)))
    }
  }

  private func openRemote(_ name: String, _ call: Call) throws(MooncakeError) -> SegmentID {
    // Recovery needs a thread later, when there is no caller to report a failure to.
    try workers.reserve()
    if let known = segments.retain(name) {
      do throws(MooncakeError) {
        try refresh(known, call)
      } catch {
        _ = try? segments.release(known.id)
        throw error
      }
      return known.id
    }
    let descriptor = try fetchDescriptor(name, call)
    let transportCount = transports.count
    let route = try transports.connect(
      to: descriptor, former: nil, link: SegmentLink(name, router), deadline: call.deadline)
    do throws(MooncakeError) {
      let (segment, isNew) = try segments.insert(name, route: route)
      if !isNew { retire(route.paths, keeping: []) }
      // One that was attached meanwhile has not seen the segment.
      if transports.count != transportCount { reconnect(segment, until: call.deadline) }
      return segment.id
    } catch {
      retire(route.paths, keeping: [])
      throw error
    }
  }

  private func retire(
    _ paths: [any Path], keeping kept: [any Path], successor: PathSuccessor? = nil
  ) {
    for path in paths where !kept.contains(where: { $0 === path }) {
      path.retire(successor: successor)
    }
  }

  /// Gives the id back. Connections end once it is closed as often as opened and its transfers are
  /// over.
  public func closeSegment(_ id: SegmentID) throws(MooncakeError) {
    try checkOpen()
    if id == 0 { return }
    guard let segment = try segments.release(id) else { return }
    retire(segment.close().paths, keeping: [])
  }

  /// The id of an open segment; nil if the name is not open.
  package func cachedSegment(_ name: String) -> SegmentID? {
    segments.id(of: String(name.drop { $0 == "/" }))
  }

  /// The current descriptor of a segment.
  public func descriptor(of id: SegmentID) throws(MooncakeError) -> SegmentDescriptor {
    try checkOpen()
    return id == 0 ? local.descriptor : try segments.segment(id).route.descriptor
  }

  /// Asks a peer for a sign of life.
  public func probe(_ name: String, timeoutMilliseconds: UInt64 = 0) throws(MooncakeError) {
    try checkOpen()
    try logged { () throws(MooncakeError) in
      let call = call(until: deadline(timeoutMilliseconds))
      try RPCClient.probe(rpcAddress(of: name, call), call)
    }
  }

  /// Refetches every open segment's descriptor; where that fails, the old one stays.
  package func refreshAllSegments() {
    // One deadline for all, or an unresponsive service would cost its timeout once per segment.
    let call = call(until: deadline(0))
    for segment in segments.all where segment.id != 0 {
      do throws(MooncakeError) {
        try refresh(segment, call)
      } catch {
        Log.warning(
          "refreshing segment \(segment.name): \(error.message)", about: segment.name)
      }
    }
  }

  /// Logs a failure that no transfer's status will report.
  package func logged<Result>(
    _ body: () throws(MooncakeError) -> Result
  ) throws(MooncakeError) -> Result {
    do throws(MooncakeError) { return try body() } catch {
      Log.warning(error.message)
      var logged = error
      logged.isLogged = true
      throw logged
    }
  }
}

// MARK: - Keeping descriptors true

extension TransferEngine {
  /// Fetches a descriptor and replaces the route; a peer that has moved gets new paths.
  func refresh(_ segment: OpenSegment, _ call: Call) throws(MooncakeError) {
    repeat {
      let old = segment.route
      let new = try fetchDescriptor(segment.name, known: old.descriptor, call)
      if new.isOlder(than: old.descriptor) {
        Log.info("segment \(segment.name): ignored a descriptor older than the known one")
        return
      }
      if try replaceRoute(of: segment, old, new, until: call.deadline) { return }
      // Another thread has replaced it meanwhile, perhaps after an older answer.
    } while !segment.isClosed && !call.deadline.hasPassed
  }

  /// Makes the paths to a segment's known descriptor anew, for a transport that was attached.
  func reconnect(_ segment: OpenSegment, until deadline: Deadline) {
    do throws(MooncakeError) {
      repeat {
        let old = segment.route
        let descriptor = segment.id == 0 ? ownDescriptor : old.descriptor
        if try replaceRoute(of: segment, old, descriptor, until: deadline) { return }
      } while !segment.isClosed && !deadline.hasPassed
    } catch {
      Log.info(error.message)
    }
  }

  /// Replaces the route `old` by one to `descriptor`; false if the route is another by now.
  private func replaceRoute(
    of segment: OpenSegment, _ old: SegmentRoute, _ descriptor: SegmentDescriptor,
    until deadline: Deadline
  ) throws(MooncakeError) -> Bool {
    let route = try transports.connect(
      to: descriptor, former: old, link: old.link, deadline: deadline)
    guard segment.replaceRoute(old, with: route) else {
      retire(route.paths, keeping: old.paths)
      return false
    }
    let gone = old.paths.filter { path in !route.paths.contains { $0 === path } }
    if gone.isEmpty { return true }
    Log.info(
      "segment \(segment.name): the peer restarted or moved; using its new descriptor",
      about: segment.name)
    let isRestarted = descriptor.incarnation != old.descriptor.incarnation
    retire(
      gone, keeping: [],
      successor: .init(isRestarted: isRestarted) { [weak router, weak segment] slice in
        guard let router, let segment else {
          return Batch.end(slice, .canceled, reason: "segment closed mid-transfer")
        }
        slice.pointee.triedPaths = 0
        router.resubmit(segment, slice)
      })
    return true
  }
}

// MARK: - What is known of paths

extension TransferEngine {
  /// A path to a segment, or why a transport has none.
  package struct PathReport: Sendable {
    package var transport: String
    package var description: String
    /// "used", "standby" where another is preferred, "resting" after a failure, or "none".
    package var state: String
    package var movedBytes: UInt64
    package var failureCount: UInt64
    /// Why it is not used; empty if it is.
    package var reason: String
  }

  /// The paths to a segment in order of preference, then the transports without one.
  package func paths(to id: SegmentID) throws(MooncakeError) -> [PathReport] {
    try checkOpen()
    let route = try segments.segment(id).route
    let used = route.ways.first { $0.path.isUsable }
    let paths = route.paths.map { path in
      let isUsed =
        path.isUsable && path.transportName == used?.path.transportName
      return PathReport(
        transport: path.transportName, description: path.description,
        state: isUsed ? "used" : path.isUsable ? "standby" : "resting",
        movedBytes: path.movedBytes, failureCount: path.health.failureCount,
        reason: path.isUsable ? "" : path.health.failure ?? "the connection to it was lost")
    }
    return paths
      + route.absences.map {
        PathReport(
          transport: $0.transport, description: "", state: "none", movedBytes: 0, failureCount: 0,
          reason: $0.error.message)
      }
  }
}
