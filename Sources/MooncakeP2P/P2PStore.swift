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
    /// Where payloads are found; nil: the engine's metadata service.
    public var metadataURI: String?
    /// How long the end of a holding waits for readers.
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
  /// For holdings whose name was removed: each may wait seconds for its readers, and neither gets
  /// wait for it nor it for gets.
  private let removals = WorkerPool(name: "mc-store-drop", threadLimit: 8)
  private let kept = Lock<[MappedFile]>([])
  let catalog = Catalog()
  let watches = PayloadWatches()
  /// Holdings that are being withdrawn since their name was removed.
  private let withdrawing = Lock<Set<UInt64>>([])
  private let ownsEngine: Bool
  private let service: UInt64
  private let isClosing = Atomic(false)
  /// Readable once it closes: whoever waits for a service, or for a holder, ends that.
  private let closing: EventFD
  /// 1 once it is closed.
  private let closed = Futex()

  /// Uses an engine that stays the caller's and must be closed after the store.
  public convenience init(
    _ engine: TransferEngine, _ options: Options = Options()
  ) throws(EngineError) {
    try self.init(engine, options, ownsEngine: false)
  }

  /// Makes an engine of its own.
  public convenience init(
    engineOptions: TransferEngine.Options, _ options: Options = Options()
  ) throws(EngineError) {
    let engine = try TransferEngine(engineOptions)
    do throws(EngineError) {
      try self.init(engine, options, ownsEngine: true)
    } catch {
      engine.close()
      throw error
    }
  }

  private init(
    _ engine: TransferEngine, _ options: Options, ownsEngine: Bool
  ) throws(EngineError) {
    self.engine = engine
    self.ownsEngine = ownsEngine
    drainMilliseconds = options.drainMilliseconds
    directory = StoreDirectory(try Self.openDirectory(engine, options))
    shared = UpstreamCatalog(directory)
    memory = MemoryTable(engine)
    do throws(Errno) { closing = try EventFD() } catch {
      throw EngineError(.system, "making an event descriptor for a store: \(error)")
    }
    // What was removed by its name must be withdrawn, whatever the state of the host.
    try removals.reserve()
    do throws(EngineError) {
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
  ) throws(EngineError) -> MetadataDirectory {
    if let text = options.metadataURI {
      let uri = try MetadataURI(parsing: text)
      if uri.service != .peerToPeer { return try MetadataDirectory(uri) }
    } else if let directory = engine.directory {
      return directory
    }
    throw EngineError(
      .unsupported,
      "the store needs a metadata service to find payloads: name one, such as etcd://host:2379, or "
        + "start one with `mooncake metadata serve`")
  }

  /// Ends all watches, withdraws every payload, waiting for readers as long as the options say, and
  /// frees what the store allocated. Idempotent; a second caller waits for the first, unless it is
  /// the handler of a watch: that is what the first waits for.
  public func close() {
    if isClosing.exchange(true, ordering: .acquiringAndReleasing) {
      if watches.isCurrent { return }
      while closed.value == 0 { closed.wait(while: 0, until: .never) }
      // The first may be a handler, which still runs.
      watches.close()
      return
    }
    // First this: what handlers call must not keep them.
    catalog.refuse()
    closing.signal()
    watches.close()
    let deadline = Deadline.after(milliseconds: drainMilliseconds)
    let entries = catalog.close()
    for entry in entries { entry.holding?.stopGranting() }
    // One time for all that the service is told.
    let call = MetadataCall(until: .after(milliseconds: Self.closeMilliseconds))
    keeper.stop(until: call.deadline)
    for entry in entries where entry.holding != nil || entry.isShared {
      shared?.removeOwn(entry.name, segment: engine.name, call)
    }
    shared?.settle(call, isLast: true)
    for entry in entries { drain(entry, until: deadline, nil) }
    let last = MetadataCall(until: .after(milliseconds: Self.releaseMilliseconds))
    for var entry in entries {
      // The engine has logged whose copy does not end.
      try? dissolve(&entry, last)
    }
    kept.withLock { $0 = [] }
    engine.services.remove(service)
    removals.stop()
    workers.stop()
    // Farewells free places at holders.
    engine.caller.drain(until: .after(milliseconds: 500))
    if ownsEngine { engine.close() }
    closed.store(1)
    closed.wakeAll()
  }

  /// Keeps files that peers may still read until that has ended for all.
  func keep(_ files: [MappedFile]) { kept.withLock { $0 += files } }

  /// What the metadata service gets to forget the payloads of a store that closes.
  private static let closeMilliseconds: UInt64 = 2000
  /// What it gets to forget their memory, and peers to end the copies that they have begun.
  private static let releaseMilliseconds: UInt64 = 500

  /// Lets readers of a holding finish until the deadline; it grants nothing any more.
  func drain(_ entry: Catalog.Entry, until deadline: Deadline, _ bounds: Bounds?) {
    guard let holding = entry.holding, holding.drain(until: deadline, bounds) else { return }
    Log.warning(
      "payload \(holding.name): readers were left when its memory was withdrawn; they go to other "
        + "holders")
  }

  /// Unregisters the memory of a payload, and frees it if it is the engine's. Throws BUSY if a peer
  /// is in the middle of a copy when the call is over: then the entry says where, and doing it
  /// again goes on.
  func dissolve(
    _ entry: inout Catalog.Entry, _ call: MetadataCall
  ) throws(EngineError) {
    try revoke(&entry, call)
    memory.free(entry.allocations, call)
    entry.allocations = []
  }

  /// Ends what peers may do with the memory of a payload; throws as `dissolve`.
  private func revoke(_ entry: inout Catalog.Entry, _ call: MetadataCall) throws(EngineError) {
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

  /// Grants of a payload of this store that peers have neither given back nor let expire.
  package func grantCount(of name: String) -> Int { catalog.holding(of: name)?.grantCount ?? 0 }

  func bounds(
    _ operation: StoreOperation, _ what: String, defaultMilliseconds: UInt64
  ) -> Bounds {
    Bounds(
      operation, what, defaultMilliseconds: defaultMilliseconds,
      closing: closing.descriptor.rawValue
    ) { [catalog] in catalog.isClosed }
  }

  /// Somebody has removed the payload everywhere. The bytes stay where the caller expects them
  /// until it ends its entry.
  private func withdrawRemoved(_ record: HolderRecord) {
    let name = record.name
    let holding = record.holder.holding
    // It is told again with each turn of the keeper until it is done.
    if !withdrawing.withLock({ $0.insert(holding).inserted }) { return }
    let isTaken = removals.run { [self] in
      defer { withdrawing.withLock { _ = $0.remove(holding) } }
      // The name may be another payload's by now.
      let taken = try? catalog.take(name, where: { $0.holding?.address == record.holder })
      guard var entry = taken else { return }
      Log.warning("payload '\(name)': it was removed by its name; withdrawn here")
      withdrawOffer(&entry)
      catalog.release(name, holding: entry)
    }
    if !isTaken { withdrawing.withLock { _ = $0.remove(holding) } }
  }

  /// Memory that a peer does not let go of stays known by the entry, for the call that ends that.
  private func withdrawOffer(_ entry: inout Catalog.Entry) {
    if let holding = entry.holding {
      holding.stopGranting()
      keeper.remove(holding.record, removalCall)
      _ = holding.drain(until: .after(milliseconds: drainMilliseconds))
    }
    do throws(EngineError) {
      try revoke(&entry, removalCall)
    } catch {
      Log.warning("payload '\(entry.name)': \(error.message)")
    }
  }

  /// What a store that closes tells the service itself.
  private var removalCall: MetadataCall {
    MetadataCall(
      until: .after(milliseconds: 3000), cancellation: closing.descriptor.rawValue)
  }
}
