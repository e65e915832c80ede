import MooncakeBase
import MooncakeEngine
import MooncakeSystem

extension P2PStore {
  /// Decides, once the manifest is known, where the bytes of a payload go: the buffers, the range
  /// that contains all of them if it is registered in one piece, and what the store frees at the
  /// end.
  package typealias Placement =
    (Manifest) throws(MooncakeError) -> (
      buffers: [PayloadBuffer], range: PayloadBuffer?, allocations: [UInt64]
    )

  /// Fetches a whole payload into the caller's buffers, or into memory that the engine allocates.
  /// Blocks until every shard has arrived and is verified. Others fetch from this process meanwhile
  /// and afterwards, unless the options say otherwise; `deleteReplica` ends that.
  public func get(
    _ name: String, into buffers: [PayloadBuffer]? = nil, _ options: GetOptions = GetOptions(),
    _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) -> GetResult {
    try get(name, options, operation) { [engine] manifest throws(MooncakeError) in
      if let buffers { return (buffers, nil, []) }
      if manifest.layout.size == 0 { return ([], nil, []) }
      try MemoryRoom.check(manifest.layout.size, "payload '\(name)'")
      // Not registered yet: that happens once it is known whether it is offered to others.
      let address = try engine.allocate(length: manifest.layout.size, location: options.location)
      return (
        [PayloadBuffer(address: address, length: manifest.layout.size)], nil,
        [UInt64(UInt(bitPattern: address))]
      )
    }
  }

  /// As above; the caller provides the memory once it knows the manifest.
  package func get(
    _ name: String, _ options: GetOptions, _ operation: StoreOperation, _ place: Placement
  ) throws(MooncakeError) -> GetResult {
    let bounds = bounds(
      operation, "getting payload '\(name)'", defaultMilliseconds: 0)
    try PayloadName.check(name)
    try catalog.reserve(name)
    var held: Catalog.Entry?
    defer { catalog.release(name, holding: held) }
    let start = Clock.now()
    while true {
      try bounds.check("start")
      guard let target = try locate(name, options, bounds) else {
        guard let shared, options.version == nil,
          let document = try shared.revised(name, bounds.call)
        else { throw notFound(name) }
        return try getUnverified(document, options, bounds, place, &held, since: start)
      }
      do throws(MooncakeError) {
        return try fetch(target, options, bounds, place, &held, since: start)
      } catch {
        // The version may be gone because the name has a new one.
        guard [.noHolder, .unsupported, .digestMismatch].contains(error.code),
          options.version == nil, let now = try? locate(name, options, bounds),
          now.version != target.version
        else { throw explained(error, target, bounds) }
        if options.followsVersions { continue }
        throw MooncakeError(
          .notFound,
          "payload '\(name)': version \(target.version) vanished while it was fetched; the name "
            + "has version \(now.version) now: get it again, or ask to follow versions "
            + "(\(error.message))")
      }
    }
  }

  /// A version of a payload and some of its holders.
  struct Target {
    var summary: PayloadSummary
    var holders: [HolderRecord]
    /// Whether the name has a newer version.
    var isSuperseded = false
    var name: String { summary.name }
    var version: PayloadVersion { summary.version }
  }

  /// Records of holders that are read at once.
  static let holderLimit = 16

  /// Finds the version to work on; nil if nobody offers the name.
  func locate(
    _ name: String, _ options: GetOptions, _ bounds: Bounds
  ) throws(MooncakeError) -> Target? {
    try bounds.report(.locating, StoreProgress(.locating))
    let head = try head(name, options, bounds)
    if let head, options.version ?? head.version == head.version {
      var holders = try directory.holders(
        of: name, head.version, limit: Self.holderLimit, bounds.call)
      if !holders.contains(where: { $0.holder == head.origin }) {
        holders.append(HolderRecord(origin: head))
      }
      return Target(summary: head.summary, holders: holders)
    }
    if let version = options.version { return try locate(name, version, head, bounds) }
    // The origin may have died a moment ago, and no other holder has taken its place yet.
    guard let newest = try directory.newest(of: name, bounds.call) else {
      try directory.refuseLaterRecords(of: name, bounds.call)
      return nil
    }
    return Target(
      summary: newest.summary,
      holders: try directory.holders(
        of: name, newest.version, limit: Self.holderLimit, bounds.call))
  }

  /// The record under the name. A caller that asks for a version can do without a readable one.
  private func head(
    _ name: String, _ options: GetOptions, _ bounds: Bounds
  ) throws(MooncakeError) -> PayloadHead? {
    do throws(MooncakeError) {
      return try directory.head(name, bounds.call)
    } catch {
      let isUnreadable = error.code == .unsupported || error.code == .protocolViolation
      guard options.version != nil, isUnreadable else { throw error }
      return nil
    }
  }

  /// Finds a version other than the one that the name has.
  private func locate(
    _ name: String, _ version: PayloadVersion, _ head: PayloadHead?, _ bounds: Bounds
  ) throws(MooncakeError) -> Target? {
    let holders = try directory.holders(
      of: name, version, limit: Self.holderLimit, bounds.call)
    // A removed version is gone at once, not only when its holders have learned of it.
    if let newest = holders.max(by: { $0.summary.isOlder(than: $1.summary) }),
      try !directory.removals(of: name, bounds.call).cover(newest.summary)
    {
      return Target(
        summary: newest.summary, holders: holders,
        isSuperseded: head.map { newest.summary.isOlder(than: $0.summary) } ?? false)
    }
    if holders.isEmpty { try directory.refuseLaterRecords(of: name, version: version, bounds.call) }
    var present = head?.version
    if present == nil { present = try directory.newest(of: name, bounds.call)?.version }
    guard let present else { return nil }
    throw MooncakeError(
      .notFound,
      "payload '\(name)': nobody holds version \(version); the present one is \(present)")
  }

  /// The error as the caller should see it: there may be holders left whose records this release
  /// cannot read.
  func explained(_ error: MooncakeError, _ target: Target, _ bounds: Bounds) -> MooncakeError {
    if error.code != .noHolder { return error }
    do throws(MooncakeError) {
      try directory.refuseLaterRecords(
        of: target.name, version: target.version, bounds.shortCall)
    } catch let later {
      if later.code == .unsupported {
        return MooncakeError(.unsupported, "\(error.message); not asked: \(later.message)")
      }
    }
    return error
  }

  /// Reads the manifest from any holder.
  func manifest(
    of target: Target, _ bounds: Bounds
  ) throws(MooncakeError) -> ManifestSearch.Outcome {
    var search = ManifestSearch(engine, workers, target.holders, target.version, bounds)
    return try search.run(target.name)
  }

  private func fetch(
    _ target: Target, _ options: GetOptions, _ bounds: Bounds, _ place: Placement,
    _ held: inout Catalog.Entry?, since start: UInt64
  ) throws(MooncakeError) -> GetResult {
    let search = try manifest(of: target, bounds)
    let manifest = search.manifest
    let (buffers, range, allocations) = try place(manifest)
    var entry = Catalog.Entry(
      name: target.name, isOrigin: false, holding: nil, layout: nil, allocations: allocations)
    do throws(MooncakeError) {
      let layout = try Self.layout(target.name, buffers, in: range, for: manifest)
      // A copy of a writable payload is a snapshot, of no use to others.
      let isOffered = options.sharesOnward && !manifest.isWritable
      entry = try accept(
        target, manifest, layout, isOffered, options, bounds, leaving: &entry.ending)
      entry.allocations = allocations
    } catch {
      if entry.ending.isEmpty { memory.free(allocations, bounds.lastCall) } else { held = entry }
      throw error
    }
    do throws(MooncakeError) {
      if var record = entry.holding?.record {
        record.isSuperseded = target.isSuperseded
        keeper.put(record, bounds.shortCall)
      }
      let sources = try download(target, search, entry, options, bounds)
      if let holding = entry.holding { complete(holding, bounds) }
      held = entry
      var info = target.summary.info(holderCount: UInt64(target.holders.count))
      info.bufferSizes = manifest.layout.bufferSizes
      return GetResult(
        info: info, buffers: buffers, isVerified: !manifest.isWritable,
        nanoseconds: Clock.now() &- start, sources: sources, attributes: manifest.attributes)
    } catch {
      let failure = undo(&entry, error, bounds)
      if !entry.ending.isEmpty { held = entry }
      throw failure
    }
  }

  /// Registers the receiver's memory.
  private func accept(
    _ target: Target, _ manifest: Manifest, _ layout: BufferLayout, _ isOffered: Bool,
    _ options: GetOptions, _ bounds: Bounds, leaving ending: inout [UInt64]
  ) throws(MooncakeError) -> Catalog.Entry {
    if isOffered {
      return try offer(
        target.name, manifest, layout, isOrigin: false, location: options.location,
        available: ShardSet(count: manifest.layout.shardCount),
        publishedMilliseconds: target.summary.publishedMilliseconds, bounds, leaving: &ending)
    }
    try memory.register(
      layout.ranges, location: options.location, access: .local, bounds.call, leaving: &ending)
    return Catalog.Entry(name: target.name, isOrigin: false, holding: nil, layout: layout)
  }

  private func download(
    _ target: Target, _ search: ManifestSearch.Outcome, _ entry: Catalog.Entry,
    _ options: GetOptions, _ bounds: Bounds
  ) throws(MooncakeError) -> [GetResult.Source] {
    let directory = directory
    var service = PayloadDownload.Directory { call throws(MooncakeError) in
      try directory.holders(of: target.name, target.version, limit: Self.holderLimit, call)
    }
    if options.followsVersions && options.version == nil {
      service.present = { call throws(MooncakeError) in
        try directory.head(target.name, call)?.version
      }
    }
    return try PayloadDownload(
      engine, workers, search, into: entry.layout!, holding: entry.holding,
      holders: target.holders, service, bounds
    ).run()
  }

  /// Tells others that the whole payload is here. A failure is repaired later or harmless.
  private func complete(_ holding: Holding, _ bounds: Bounds) {
    keeper.put(holding.record, bounds.shortCall)
    shared?.addReplica(
      holding.name, version: holding.version, segment: engine.name, holding.shardAddresses,
      bounds.shortCall)
  }

  /// Checks that whole shards fit into the buffers.
  static func layout(
    _ name: String, _ buffers: [PayloadBuffer], in range: PayloadBuffer?, for manifest: Manifest
  ) throws(MooncakeError) -> BufferLayout {
    let layout = try layout(name, buffers, in: range)
    if layout.size != manifest.layout.size {
      throw MooncakeError(
        .sizeMismatch,
        "payload '\(name)': it has \(manifest.layout.size) bytes, the buffers have \(layout.size)")
    }
    for shard in 0..<manifest.layout.shardCount {
      let range = manifest.layout.range(ofShard: shard)
      if layout.address(of: range.offset, length: range.length) == nil {
        throw MooncakeError(
          .sizeMismatch,
          "payload '\(name)': shard \(shard) (bytes \(range.offset) to "
            + "\(range.offset + range.length)) crosses the end of a buffer: give buffers of the "
            + "sizes that it was registered with, or one for all")
      }
    }
    return layout
  }
}
