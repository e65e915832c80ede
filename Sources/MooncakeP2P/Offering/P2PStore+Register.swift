import MooncakeBase
import MooncakeEngine
import MooncakeSystem

extension P2PStore {
  /// Makes buffers a payload that others find by its name. The memory stays the caller's and must
  /// not change until the payload is unregistered. If this or another store has registered the
  /// name, it gets a new version, unless the options say otherwise; bytes of two versions are never
  /// mixed.
  @discardableResult
  public func register(
    _ name: String, _ buffers: [PayloadBuffer], _ options: RegisterOptions = RegisterOptions(),
    _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) -> PayloadInfo {
    if buffers.isEmpty {
      throw MooncakeError(.invalidArgument, "payload '\(name)': no buffers are given")
    }
    let layout = try Self.layout(name, buffers)
    return try register(name, layout, options, operation) { piece, pause throws(MooncakeError) in
      let start = Self.pointer(layout.buffers[piece.buffer].address + piece.offset)
      return try Digest(
        of: UnsafeRawBufferPointer(start: start, count: Int(piece.length)), pause: pause)
    }
  }

  /// As above; `digestOf` reads the bytes of a shard, on several threads at once.
  package func register(
    _ name: String, _ layout: BufferLayout, _ options: RegisterOptions,
    _ operation: StoreOperation,
    digestOf: @escaping ShardHashing.Source
  ) throws(MooncakeError) -> PayloadInfo {
    let bounds = bounds(
      operation, "registering payload '\(name)'", defaultMilliseconds: 0)
    try PayloadName.check(name)
    let sizes = layout.buffers.map(\.length)
    let shards = try ShardLayout(
      bufferSizes: sizes,
      shardBytes: options.shardBytes == 0
        ? ShardLayout.defaultShardBytes(bufferSizes: sizes) : options.shardBytes)
    var former = try catalog.reserveReplacing(name)
    var entry: Catalog.Entry?
    var ending: [UInt64] = []
    defer { catalog.release(name, holding: entry ?? Self.left(name, former, ending)) }
    try bounds.check("start")
    if options.isCreateOnly {
      let head = try directory.head(name, bounds.call)
      if former != nil || head != nil { throw Self.taken(name) }
    }
    defer { if entry == nil { former?.holding?.resumeGranting() } }
    if options.isWritable { try waitForLateWriters(layout, former?.holding, bounds) }
    let digests = options.isWritable ? [] : try ShardHashing.run(shards, bounds, digestOf)
    let manifest = try Manifest(
      layout: shards, digests: digests, isWritable: options.isWritable,
      // Without digests, nothing else would distinguish two versions.
      salt: options.isWritable ? .random(in: 1 ... .max) : 0, attributes: options.attributes)
    var new = try offer(
      name, manifest, layout, isOrigin: true, location: options.location,
      available: ShardSet(count: manifest.layout.shardCount, isFull: true), bounds,
      leaving: &ending)
    let holding = new.holding!
    do throws(MooncakeError) {
      try bounds.report(
        .publishing,
        StoreProgress(.publishing, doneBytes: layout.size, totalBytes: layout.size))
      try publish(holding, isCreateOnly: options.isCreateOnly, bounds)
    } catch {
      let failure = undo(&new, error, bounds)
      ending = new.ending
      throw failure
    }
    entry = new
    if former != nil { entry!.ending = withdrawReplaced(&former!, bounds) }
    return holding.info(holderCount: 1)
  }

  /// Withdraws a version that has been replaced. Returns memory that a peer does not let go of; the
  /// next call that ends the name waits for it.
  private func withdrawReplaced(_ former: inout Catalog.Entry, _ bounds: Bounds) -> [UInt64] {
    do throws(MooncakeError) {
      try withdraw(
        &former, until: .after(milliseconds: drainMilliseconds), bounds, isReplaced: true)
    } catch {
      Log.warning("payload '\(former.name)', replaced by a new version: \(error.message)")
    }
    return former.ending
  }

  /// Ends a payload that this store registered: nobody reads its memory when this returns. Replicas
  /// and the name stay; without a replica, the name vanishes.
  public func unregister(
    _ name: String, _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) {
    try end(name, isOrigin: true, operation)
  }

  /// Ends a replica that this store fetched, and frees its memory if the store allocated it.
  public func deleteReplica(
    _ name: String, _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) {
    try end(name, isOrigin: false, operation)
  }

  private func end(
    _ name: String, isOrigin: Bool, _ operation: StoreOperation
  ) throws(MooncakeError) {
    let what = isOrigin ? "unregistering" : "deleting the replica of"
    let bounds = bounds(
      operation, "\(what) payload '\(name)'",
      defaultMilliseconds: engine.defaultTimeoutMilliseconds)
    try PayloadName.check(name)
    guard var entry = try catalog.take(name, where: { $0.isOrigin == isOrigin }) else {
      throw MooncakeError(
        .notHeld,
        "payload '\(name)': this store has not \(isOrigin ? "registered" : "fetched") it")
    }
    do throws(MooncakeError) {
      try withdraw(
        &entry, until: min(bounds.deadline, .after(milliseconds: drainMilliseconds)), bounds)
    } catch {
      catalog.release(name, holding: entry)
      throw MooncakeError(error.code, "\(what) payload '\(name)': \(error.message)")
    }
    catalog.release(name)
  }

  /// Removes a name everywhere: every holder withdraws what was published until now.
  public func remove(
    _ name: String, _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) {
    let bounds = bounds(
      operation, "removing payload '\(name)'",
      defaultMilliseconds: engine.defaultTimeoutMilliseconds)
    try PayloadName.check(name)
    try bounds.check("start")
    let isRemoved = try directory.remove(name, bounds.call)
    let isSharedRemoved = try shared?.remove(name, bounds.call) ?? false
    if !isRemoved && !isSharedRemoved { throw notFound(name) }
  }

  // MARK: Parts

  /// Registers memory and lets peers find it by the holding's number, not yet by name. If a failed
  /// call cannot undo this because a peer touches the memory, `ending` gets the addresses.
  func offer(
    _ name: String, _ manifest: Manifest, _ layout: BufferLayout, isOrigin: Bool,
    location: String, available: ShardSet,
    publishedMilliseconds: UInt64 = WallClock.milliseconds(), _ bounds: Bounds,
    leaving ending: inout [UInt64]
  ) throws(MooncakeError) -> Catalog.Entry {
    let holding = try Holding(
      name: name, engine, manifest, layout, available: available, isOrigin: isOrigin,
      publishedMilliseconds: publishedMilliseconds)
    do throws(MooncakeError) {
      // Publishes the holding's own memory too: the metadata service is waited for once.
      try memory.register(
        layout.ranges, location: location,
        access: manifest.isWritable ? [.remoteRead, .remoteWrite] : .remoteRead, bounds.call,
        leaving: &ending)
    } catch {
      memory.free(
        [holding.index], Call(until: .after(milliseconds: Bounds.momentMilliseconds)))
      throw error
    }
    catalog.open(holding)
    return Catalog.Entry(name: name, isOrigin: isOrigin, holding: holding, layout: layout)
  }

  /// Peers may still have grants to write into a former payload on the same memory, or into one
  /// that is about to be replaced, for which the memory stays open.
  private func waitForLateWriters(
    _ layout: BufferLayout, _ former: Holding?, _ bounds: Bounds
  ) throws(MooncakeError) {
    var writable: Holding?
    if let former, former.manifest.isWritable,
      BufferLayout.overlap(former.layout.ranges, layout.ranges)
    {
      writable = former
      former.pauseGranting()
    }
    while memory.endOfLateWrites(to: layout.ranges) > Clock.now() || writable?.grantCount ?? 0 > 0 {
      try bounds.check("waiting until peers cannot write to the former payload there any more")
      bounds.sleep(orReadable: -1)
    }
  }

  private func publish(
    _ holding: Holding, isCreateOnly: Bool, _ bounds: Bounds
  ) throws(MooncakeError) {
    try keeper.publish(holding.record, isCreateOnly: isCreateOnly, bounds.call)
    guard let shared else { return }
    do throws(MooncakeError) {
      try shared.put(holding.document, isCreateOnly: isCreateOnly, bounds.call)
    } catch {
      // It may have been written all the same, or be written once the service recovers.
      if error.code != .exists { shared.owe(holding.name, segment: engine.name) }
      keeper.remove(holding.record, bounds.lastCall)
      throw error
    }
  }

  /// Withdraws a payload of this store from the metadata service and from memory; throws as
  /// `dissolve`. After a replacement, Mooncake's document already belongs to the successor.
  func withdraw(
    _ entry: inout Catalog.Entry, until deadline: Deadline, _ bounds: Bounds,
    isReplaced: Bool = false
  ) throws(MooncakeError) {
    if let holding = entry.holding {
      holding.stopGranting()
      keeper.remove(holding.record, bounds.lastCall)
    }
    if !isReplaced && (entry.holding != nil || entry.isShared) {
      shared?.removeOwn(entry.name, segment: engine.name, bounds.lastCall)
    }
    drain(entry, until: deadline, bounds)
    try dissolve(
      &entry, bounds.release(withinMilliseconds: engine.defaultTimeoutMilliseconds))
  }

  /// Undoes what a failing call has begun and returns its error, or BUSY if a peer does not let go
  /// of the memory; then the entry names that memory.
  func undo(_ entry: inout Catalog.Entry, _ error: MooncakeError, _ bounds: Bounds) -> MooncakeError
  {
    do throws(MooncakeError) {
      try withdraw(&entry, until: .after(milliseconds: 0), bounds)
      return error
    } catch let busy {
      return MooncakeError(.busy, "\(error.message); \(busy.message)")
    }
  }

  /// What a name stands for after a failed register: what it stood for before, and memory that a
  /// peer may still touch, which the caller must end.
  private static func left(
    _ name: String, _ former: Catalog.Entry?, _ ending: [UInt64]
  ) -> Catalog.Entry? {
    if ending.isEmpty { return former }
    var entry = former ?? Catalog.Entry(name: name, isOrigin: true, holding: nil, layout: nil)
    entry.ending += ending
    return entry
  }

  /// `range`: one range that contains all buffers and is registered in their place.
  static func layout(
    _ name: String, _ buffers: [PayloadBuffer], in range: PayloadBuffer? = nil
  ) throws(MooncakeError) -> BufferLayout {
    if buffers.count > ShardLayout.maximumBufferCount {
      throw MooncakeError(
        .invalidArgument,
        "payload '\(name)': \(buffers.count) buffers, at most "
          + "\(ShardLayout.maximumBufferCount) make a payload")
    }
    func plain(_ buffer: PayloadBuffer) -> BufferLayout.Buffer {
      .init(address: UInt64(UInt(bitPattern: buffer.address)), length: buffer.length)
    }
    let layout = BufferLayout(buffers.map(plain), in: range.map(plain))
    guard let layout else {
      throw MooncakeError(
        .invalidArgument, "payload '\(name)': a buffer is null or empty, or wraps around")
    }
    return layout
  }

  static func pointer(_ address: UInt64) -> UnsafeRawPointer {
    UnsafeRawPointer(bitPattern: UInt(address))!
  }

  static func taken(_ name: String) -> MooncakeError {
    MooncakeError(
      .exists, "payload '\(name)': the name is taken: choose another, or do not ask for create-only"
    )
  }

  func notFound(_ name: String) -> MooncakeError {
    MooncakeError(
      .notFound,
      "payload '\(name)': nobody offers it in metadata \(directory.uri): was it registered there, "
        + "with the same MC_METADATA_CLUSTER_ID?")
  }
}
