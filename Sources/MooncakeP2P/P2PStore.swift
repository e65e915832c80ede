import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// Named payloads in the memory of many processes: registers its own, fetches those of others and
/// offers them onward.
///
/// Every method may be called from any thread at any time; calls that name the same payload exclude
/// each other. After `close` they throw.
public final class P2PStore: Sendable {
  public struct Options: Sendable {
    /// Where payloads are looked up; nil: the engine's metadata service.
    public var metadataURI: String?
    /// How long ending a holding waits for readers.
    public var drainMilliseconds: UInt64 = 5000

    public init() {}
  }

  /// The engine that moves the bytes.
  public let engine: TransferEngine
  package let directory: StoreDirectory
  package let keeper: RecordKeeper
  package let shared: UpstreamCatalog?
  package let drainMilliseconds: UInt64
  let memory: MemoryTable
  let workers = WorkerPool(name: "mc-store-ask", threadLimit: 32)
  /// For holdings whose name was removed. Each may wait seconds for its readers; a pool of their
  /// own keeps gets from waiting for them, and them for gets.
  private let removals = WorkerPool(name: "mc-store-drop", threadLimit: 8)
  private let kept = Lock<[MappedFile]>([])
  let catalog = Catalog()
  let watches = PayloadWatches()
  /// Holdings being withdrawn because their name was removed.
  private let withdrawing = Lock<Set<UInt64>>([])
  private let ownsEngine: Bool
  private let service: UInt64
  private let isClosing = Atomic(false)
  /// Readable once the store closes, which ends waits for services and holders.
  private let closing: EventFD
  /// 1 once it is closed.
  private let closed = Futex()

  /// Uses the caller's engine, which must be closed after the store.
  public convenience init(
    _ engine: TransferEngine, _ options: Options = Options()
  ) throws(MooncakeError) {
    try self.init(engine, options, ownsEngine: false)
  }

  /// Creates an engine of its own.
  public convenience init(
    engineOptions: TransferEngine.Options, _ options: Options = Options()
  ) throws(MooncakeError) {
    let engine = try TransferEngine(engineOptions)
    do throws(MooncakeError) {
      try self.init(engine, options, ownsEngine: true)
    } catch {
      engine.close()
      throw error
    }
  }

  private init(
    _ engine: TransferEngine, _ options: Options, ownsEngine: Bool
  ) throws(MooncakeError) {
    self.engine = engine
    self.ownsEngine = ownsEngine
    drainMilliseconds = options.drainMilliseconds
    directory = StoreDirectory(try Self.openDirectory(engine, options))
    shared = UpstreamCatalog(directory)
    memory = MemoryTable(engine)
    do throws(Errno) { closing = try EventFD() } catch {
      throw MooncakeError(.system, "making an event descriptor for a store: \(error)")
    }
    // A removed payload must be withdrawn even when the host has no thread to spare.
    try removals.reserve()
    do throws(MooncakeError) {
      try workers.reserve()
      keeper = try RecordKeeper(directory)
    } catch {
      workers.stop()
      removals.stop()
      throw error
    }
    service = engine.services.add { [catalog] call in
      StoreService.answer(call, holding: { catalog.holding($0) })
    }
    if let shared { keeper.onTurn { shared.settle($0) } }
    keeper.onRemoval { [weak self] record in self?.withdrawRemoved(record) }
  }

  deinit { close() }

  private static func openDirectory(
    _ engine: TransferEngine, _ options: Options
  ) throws(MooncakeError) -> MetadataDirectory {
    if let text = options.metadataURI {
      let uri = try MetadataURI(parsing: text)
      if uri.service != .peerToPeer { return try MetadataDirectory(uri) }
    } else if let directory = engine.directory {
      return directory
    }
    throw MooncakeError(
      .unsupported,
      "the store needs a metadata service to find payloads: name one, such as etcd://host:2379, or "
        + "start one with `mooncake metadata serve`")
  }

  /// Ends all watches, withdraws every payload, waiting for readers as long as the options say, and
  /// frees what the store allocated. Idempotent. A second caller waits for the first, except in the
  /// handler of a watch, because the first waits for that.
  public func close() {
    if isClosing.exchange(true, ordering: .acquiringAndReleasing) {
      if watches.isCurrent { return }
      while closed.value == 0 { closed.wait(while: 0, until: .never) }
      // The first caller may be a handler that is still running.
      watches.close()
      return
    }
    // Before all else, so that calls made by handlers do not keep them running.
    catalog.refuse()
    closing.signal()
    watches.close()
    let deadline = Deadline.after(milliseconds: drainMilliseconds)
    let entries = catalog.close()
    for entry in entries { entry.holding?.stopGranting() }
    // One deadline for all calls to the service.
    let call = Call(until: .after(milliseconds: Self.closeMilliseconds))
    keeper.stop(until: call.deadline)
    for entry in entries where entry.holding != nil || entry.isShared {
      shared?.removeOwn(entry.name, segment: engine.name, call)
    }
    shared?.settle(call, isLast: true)
    for entry in entries { drain(entry, until: deadline, nil) }
    let last = Call(until: .after(milliseconds: Self.releaseMilliseconds))
    for var entry in entries {
      // The engine has logged whose copy does not end.
      try? dissolve(&entry, last)
    }
    kept.withLock { $0 = [] }
    engine.services.remove(service)
    removals.stop()
    workers.stop()
    // The last messages to holders free places there.
    engine.caller.drain(until: .after(milliseconds: 500))
    if ownsEngine { engine.close() }
    closed.store(1)
    closed.wakeAll()
  }

  /// Keeps files that peers may still read until the store has closed.
  func keep(_ files: [MappedFile]) { kept.withLock { $0 += files } }

  /// Time for the metadata service to delete the payloads of a store that closes.
  private static let closeMilliseconds: UInt64 = 2000
  /// Time for it to delete their memory, and for peers to end the copies that they have begun.
  private static let releaseMilliseconds: UInt64 = 500

  /// Stops granting and lets readers of a holding finish until the deadline.
  func drain(_ entry: Catalog.Entry, until deadline: Deadline, _ bounds: Bounds?) {
    guard let holding = entry.holding, holding.drain(until: deadline, bounds) else { return }
    Log.warning(
      "payload \(holding.name): some readers had not finished when its memory was withdrawn; they "
        + "go on with other holders")
  }

  /// Unregisters the memory of a payload, and frees it if it is the engine's. Throws BUSY if a peer
  /// is still in the middle of a copy when the call is over: the entry then names that memory, and
  /// another call continues.
  func dissolve(
    _ entry: inout Catalog.Entry, _ call: Call
  ) throws(MooncakeError) {
    try revoke(&entry, call)
    memory.free(entry.allocations, call)
    entry.allocations = []
  }

  /// Ends peers' access to the memory of a payload; throws as `dissolve`.
  private func revoke(_ entry: inout Catalog.Entry, _ call: Call) throws(MooncakeError) {
    let ranges = entry.layout?.ranges ?? []
    if let holding = entry.holding, holding.manifest.isWritable {
      memory.expectWrites(to: ranges, until: holding.lastGrantExpiry)
    }
    let addresses = entry.ending + memory.release(ranges)
    if let holding = entry.holding {
      catalog.close(holding)
      memory.free([holding.index], call)
    }
    (entry.holding, entry.layout, entry.isShared, entry.ending) = (nil, nil, false, addresses)
    try memory.finish(addresses, call)
    entry.ending = []
  }

  /// Grants for a payload of this store that are neither returned nor expired.
  package func grantCount(of name: String) -> Int { catalog.holding(of: name)?.grantCount ?? 0 }

  func bounds(
    _ operation: StoreOperation, _ what: String, defaultMilliseconds: UInt64
  ) -> Bounds {
    Bounds(
      operation, what, defaultMilliseconds: defaultMilliseconds,
      closing: closing.descriptor.rawValue
    ) { [catalog] in catalog.isClosed }
  }

  /// Somebody has removed the payload everywhere. The caller expects the bytes in place until it
  /// ends its entry, so they stay.
  private func withdrawRemoved(_ record: HolderRecord) {
    let name = record.name
    let holding = record.holder.holding
    // The keeper repeats this each round until it is done.
    if !withdrawing.withLock({ $0.insert(holding).inserted }) { return }
    let isTaken = removals.run { [self] in
      defer { withdrawing.withLock { _ = $0.remove(holding) } }
      // By now the name may belong to another payload.
      let taken = try? catalog.take(name, where: { $0.holding?.address == record.holder })
      guard var entry = taken else { return }
      Log.warning("payload '\(name)': it was removed by its name and is withdrawn here")
      withdrawOffer(&entry)
      catalog.release(name, holding: entry)
    }
    if !isTaken { withdrawing.withLock { _ = $0.remove(holding) } }
  }

  /// Memory that a peer does not let go of stays in the entry, for the call that ends it.
  private func withdrawOffer(_ entry: inout Catalog.Entry) {
    if let holding = entry.holding {
      holding.stopGranting()
      keeper.remove(holding.record, removalCall)
      _ = holding.drain(until: .after(milliseconds: drainMilliseconds))
    }
    do throws(MooncakeError) {
      try revoke(&entry, removalCall)
    } catch {
      Log.warning("payload '\(entry.name)': \(error.message)")
    }
  }

  /// Canceled when the store closes, because that tells the service itself.
  private var removalCall: Call {
    Call(
      until: .after(milliseconds: 3000), cancellation: closing.descriptor.rawValue)
  }
}
