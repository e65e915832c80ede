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
    let connections = try transport.connect(
      to: descriptor, deadline: call.deadline, handlers: handlers(for: name))
    let health = SharedMemoryHealth()
    let peer = sharedMemory?.connect(to: descriptor, deadline: call.deadline, health: health)
    let route = SegmentRoute(
      descriptor: descriptor, connections: connections, sharedMemory: peer,
      sharedMemoryHealth: health)
    do throws(MooncakeError) {
      let (segment, isNew) = try segments.insert(name, route: route)
      if !isNew { sharedMemory?.forget(peer) }
      return segment.id
    } catch {
      sharedMemory?.forget(peer)
      throw error
    }
  }

  /// Gives the id back. Connections end once it is closed as often as opened and its transfers are
  /// over.
  public func closeSegment(_ id: SegmentID) throws(MooncakeError) {
    try checkOpen()
    if id == 0 { return }
    guard let segment = try segments.release(id) else { return }
    let route = segment.close()
    route.connections.retire(successor: nil)
    sharedMemory?.forget(route.sharedMemory)
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
  /// How long a thread that others need too waits for a peer's greeting.
  private static let retryMilliseconds: UInt64 = 1_000

  /// Retries to reach the memory of a segment's peer, in the background.
  package func retrySharedMemory(_ segment: OpenSegment, _ route: SegmentRoute) {
    let health = route.sharedMemoryHealth
    guard let sharedMemory, health.beginAttempt() else { return }
    let isRunning = workers.run {
      guard
        let peer = sharedMemory.connect(
          to: route.descriptor, deadline: .after(milliseconds: Self.retryMilliseconds),
          health: health)
      else { return }
      sharedMemory.forget(segment.adopt(peer, health))
    }
    if !isRunning { _ = health.noteFailure("no thread to connect with", isFinal: false) }
  }

  /// Why shared memory is not used for a segment's peer, if the peer is on this host.
  package func sharedMemoryFailure(of id: Int32) throws(MooncakeError) -> String? {
    try segments.segment(id).route.sharedMemoryHealth.failure
  }

  /// The shared-memory peer of a segment, if there is one.
  package func sharedMemoryPeer(of id: Int32) throws(MooncakeError) -> SharedMemoryPeer? {
    try segments.segment(id).route.sharedMemory
  }

  /// Fetches a descriptor and replaces the route; a peer that has moved gets new connections.
  func refresh(_ segment: OpenSegment, _ call: Call) throws(MooncakeError) {
    let old = segment.route
    let new = try fetchDescriptor(segment.name, known: old.descriptor, call)
    if new.isOlder(than: old.descriptor) {
      Log.info("segment \(segment.name): ignored a descriptor older than the known one")
      return
    }
    let isSameProcess = new.incarnation == old.descriptor.incarnation
    let isSamePlace =
      new.tcpDataHost == old.descriptor.tcpDataHost
      && new.tcpDataPort == old.descriptor.tcpDataPort
      && new.name.utf8.elementsEqual(old.descriptor.name.utf8)
      && new.tcpProtocolVersion == old.descriptor.tcpProtocolVersion
    if isSamePlace && isSameProcess {
      // A lost peer is retried at once; one that could not be reached, after its pause.
      let isLost = old.sharedMemory.map { !$0.isUsable } ?? false
      let health = old.sharedMemoryHealth
      let peer =
        isLost
        ? sharedMemory?.connect(to: new, deadline: call.deadline, health: health)
        : old.sharedMemory
      let former = segment.replaceRoute(
        SegmentRoute(
          descriptor: new, connections: old.connections, sharedMemory: peer,
          sharedMemoryHealth: health))
      if former.sharedMemory !== peer { sharedMemory?.forget(former.sharedMemory) }
      return
    }
    let connections = try transport.connect(
      to: new, deadline: call.deadline, handlers: handlers(for: segment.name))
    let health = SharedMemoryHealth()
    let former = segment.replaceRoute(
      SegmentRoute(
        descriptor: new, connections: connections,
        sharedMemory: sharedMemory?.connect(to: new, deadline: call.deadline, health: health),
        sharedMemoryHealth: health))
    sharedMemory?.forget(former.sharedMemory)
    Log.info(
      "segment \(segment.name): the peer restarted or moved; using its new descriptor",
      about: segment.name)
    former.connections.retire(
      successor: .init(isRestarted: !isSameProcess) { [weak self, weak segment] slice in
        guard let self, let segment else {
          return Batch.end(slice, .canceled, reason: "segment closed mid-transfer")
        }
        resubmit(segment, slice)
      })
  }
}
