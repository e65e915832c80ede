import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// Keeps a process's published holdings current: one lease for all records, renewed by one thread,
/// `mc-store`, which also puts back what the service has lost and makes sure that the name of each
/// payload held here leads to a holder.
///
/// Calls talk to the service on their caller's thread and wait for nobody else; what fails is
/// retried by the thread.
package final class RecordKeeper: Sendable {
  struct Slot: Sendable {
    var record: HolderRecord { didSet { describe() } }
    /// Changes with each change of the record.
    var edition: UInt64
    /// Since when others could have removed it.
    let since: Moment
    /// False: to be deleted.
    var isWanted = true
    /// Whether the service has confirmed it in its present state.
    var isStored = false
    /// Whether the payload's head names this holding.
    var isHeadOurs = false
    /// While a call publishes it, the thread must not judge what is under its name.
    var isPublishing = false
    /// The head was put where there was none; the name may have been removed just before.
    var isUnconfirmed = false
    /// The record and the head as stored.
    private(set) var text = ""
    private(set) var headText = ""

    init(_ record: HolderRecord, since: Moment) {
      self.record = record
      self.since = since
      edition = 0
      describe()
    }

    var name: String { record.name }

    private mutating func describe() {
      text = record.json
      // The head that makes the name lead to this holding.
      headText = PayloadHead(record.summary, origin: record.holder).json
    }
  }

  /// On the directory's clock and by the time of day: in a virtual machine that was paused, only
  /// the latter shows how long.
  struct Moment: Sendable {
    let nanoseconds: UInt64
    let wallMilliseconds: UInt64

    init(_ directory: StoreDirectory) {
      nanoseconds = directory.now()
      wallMilliseconds = directory.wallMilliseconds()
    }

    /// The larger of the two where they differ.
    func milliseconds(since other: Moment) -> UInt64 {
      max(
        (nanoseconds &- other.nanoseconds) / 1_000_000,
        wallMilliseconds - min(wallMilliseconds, other.wallMilliseconds))
    }
  }

  struct State: Sendable {
    /// By key.
    var slots: [String: Slot] = [:]
    /// On the directory's clock.
    var keeper: LeaseKeeper
    var lastEdition: UInt64 = 0
    /// When all names were last checked, and the removal mark at that time.
    var looked: Moment?
    var mark: String?
    /// Whether single records could not be put.
    var isHindered = false
    var isStopping = false
    var onRemoval: (@Sendable (HolderRecord) -> Void)?
    var onTurn: (@Sendable (Call) -> Void)?
    var thread: WorkerThread?
    var withdrawal: WorkerThread?
  }

  let directory: StoreDirectory
  let state: Lock<State>
  let stopping: EventFD
  let isWithdrawing = Atomic(false)
  /// False: tests call `step`, and removals are reported on its caller's thread.
  let hasThread: Bool

  private static let attemptLimit = 8

  package init(_ directory: StoreDirectory, hasThread: Bool = true) throws(MooncakeError) {
    self.directory = directory
    self.hasThread = hasThread
    let keeper = LeaseKeeper(ttlMilliseconds: directory.ttlMilliseconds, at: directory.now())
    state = Lock(State(keeper: keeper))
    do throws(Errno) { stopping = try EventFD() } catch {
      throw MooncakeError(.system, "making an event for records: \(error)")
    }
  }

  /// Sets the handler for removals of payloads that are held here. It runs on its own thread,
  /// repeatedly until the record is removed.
  package func onRemoval(_ handler: @escaping @Sendable (HolderRecord) -> Void) {
    state.withLock { $0.onRemoval = handler }
  }

  /// Adds work for each round of the thread, within a call.
  func onTurn(_ handler: @escaping @Sendable (Call) -> Void) {
    state.withLock { $0.onTurn = handler }
  }

  var store: any MetadataService { directory.store }

  // MARK: Calls

  /// Publishes a holding and makes the payload's name lead to it. Throws `exists` if the name is
  /// taken and only a new one is wanted; after an error nothing stays published.
  package func publish(
    _ record: HolderRecord, isCreateOnly: Bool, _ call: Call
  ) throws(MooncakeError) {
    let key = directory.holderKey(record)
    try start()
    do throws(MooncakeError) {
      try putWithHead(record, key, isCreateOnly: isCreateOnly, call)
      try outlive(record, key, isCreateOnly: isCreateOnly, call)
      state.withLock { $0.slots[key]?.isPublishing = false }
    } catch {
      remove(record, call)
      throw error
    }
  }

  /// A concurrent removal covers what was published until a moment ago. A holding just published
  /// must not be withdrawn by it afterwards, so it is published again with a later time.
  private func outlive(
    _ record: HolderRecord, _ key: String, isCreateOnly: Bool, _ call: Call
  ) throws(MooncakeError) {
    for _ in 0..<Self.attemptLimit {
      guard let slot = state.withLock({ $0.slots[key] }) else { throw Self.closed }
      if try !directory.removals(of: record.name, call).cover(slot.record.summary) { return }
      // The name is free or still this holding's, unless somebody else has taken it since.
      if isCreateOnly { try directory.delete(headEntry(slot), call) }
      try putWithHead(record, key, isCreateOnly: isCreateOnly, call)
    }
    throw MooncakeError(
      .notFound,
      "payload '\(record.name)': each time that it was published in metadata \(directory.uri), "
        + "somebody removed it: register it again once that has stopped")
  }

  private func putWithHead(
    _ record: HolderRecord, _ key: String, isCreateOnly: Bool, _ call: Call
  ) throws(MooncakeError) {
    note(try latest(record, call), key, isPublishing: true)
    try settle(key, call)
    let head = state.withLock { $0.slots[key].map(headEntry) }
    guard let head else { throw Self.closed }
    let isPut = try withLease(call) { lease throws(MooncakeError) in
      if isCreateOnly { return try store.putIfAbsent(head, lease: lease, call) }
      try store.put(head, lease: lease, call)
      return true
    }
    if !isPut {
      throw MooncakeError(
        .exists,
        "payload '\(record.name)': the name is taken in metadata \(directory.uri): choose "
          + "another, or do not ask for create-only")
    }
    state.withLock { $0.slots[key]?.isHeadOurs = true }
  }

  /// The record with a publishing time after everything that the service has under its name, so
  /// that differing clocks do not make it an older version.
  private func latest(
    _ record: HolderRecord, _ call: Call
  ) throws(MooncakeError) -> HolderRecord {
    let name = record.name
    let head = directory.head(name, in: try store.values(of: [directory.headKey(name)], call)[0])
    var last = try directory.removals(of: name, call).untilMilliseconds ?? 0
    for summary in try directory.versions(of: name, call).map(\.summary)
      + (head.map { [$0.summary] } ?? [])
    {
      last = max(last, summary.publishedMilliseconds)
    }
    var record = record
    record.summary.publishedMilliseconds = max(
      record.summary.publishedMilliseconds, last &+ (last == .max ? 0 : 1))
    return record
  }

  /// Publishes a holding, or changes to it.
  package func put(_ record: HolderRecord, _ call: Call) {
    let key = directory.holderKey(record)
    do throws(MooncakeError) {
      try start()
      note(record, key)
      try settle(key, call)
    } catch {
      Log.warning("payload '\(record.name)': its record could not be put yet: \(error.message)")
    }
  }

  /// Deletes a holding's record, and the payload's head if it names this holding.
  package func remove(_ record: HolderRecord, _ call: Call) {
    let key = directory.holderKey(record)
    let isKnown = state.withLock { state in
      guard state.slots[key] != nil else { return false }
      state.lastEdition &+= 1
      state.slots[key]?.edition = state.lastEdition
      state.slots[key]?.isWanted = false
      // If deleting it fails, the thread does it.
      state.slots[key]?.isStored = false
      return true
    }
    if !isKnown { return }
    do throws(MooncakeError) {
      try settle(key, call)
    } catch {
      Log.info("payload '\(record.name)': its record could not be deleted yet: \(error.message)")
    }
  }

  /// Ends the thread and deletes everything that was put. Afterwards no handler runs, except one
  /// that calls this.
  package func stop(until end: Deadline = .never) {
    let (isFirst, thread) = state.withLock { state in
      defer { state.isStopping = true }
      return (!state.isStopping, state.thread.take())
    }
    if !isFirst { return }
    stopping.signal()
    thread?.join()
    // Only the thread could start another one, and it has ended.
    let withdrawal = state.withLock { $0.withdrawal.take() }
    if let withdrawal, !withdrawal.isCurrent { withdrawal.join() }
    let (entries, lease, milliseconds) = state.withLock { state in
      defer { state.slots = [:] }
      return (self.entries(state), state.keeper.lease, state.keeper.endMilliseconds)
    }
    if lease == nil { return }
    do throws(MooncakeError) {
      try store.revoke(
        lease, entries, Call(until: min(end, .after(milliseconds: milliseconds))))
    } catch {
      Log.warning("records of payloads stay until their lease ends: \(error.message)")
    }
  }

  // MARK: Records

  private func note(_ record: HolderRecord, _ key: String, isPublishing: Bool = false) {
    let now = Moment(directory)
    state.withLock { state in
      state.lastEdition &+= 1
      var slot = state.slots[key] ?? Slot(record, since: now)
      var record = record
      // Keep what the thread has learned about the name meanwhile.
      record.isSuperseded = record.isSuperseded || slot.record.isSuperseded
      record.summary.publishedMilliseconds = max(
        record.publishedMilliseconds, slot.record.publishedMilliseconds)
      slot.record = record
      slot.edition = state.lastEdition
      slot.isWanted = true
      slot.isStored = false
      slot.isPublishing = isPublishing
      state.slots[key] = slot
    }
  }

  /// Makes the stored record match the wanted one. Another thread may be doing the same: the one
  /// that finds that it stored an outdated record repeats until it is right.
  func settle(_ key: String, _ call: Call) throws(MooncakeError) {
    var didPut = false
    while true {
      guard let slot = state.withLock({ $0.slots[key] }) else {
        if didPut { _ = try store.delete(key, call) }
        return
      }
      if slot.isWanted {
        let entry = MetadataEntry(key: key, value: slot.text)
        try withLease(call) { lease throws(MooncakeError) in
          try store.put(entry, lease: lease, call)
        }
        didPut = true
      } else {
        _ = try store.delete(key, call)
        if slot.record.isComplete { try directory.delete(headEntry(slot), call) }
      }
      let isSettled = state.withLock { state in
        guard state.slots[key]?.edition == slot.edition else { return false }
        if slot.isWanted { state.slots[key]?.isStored = true } else { state.slots[key] = nil }
        return true
      }
      if isSettled { return }
    }
  }

  func headEntry(_ slot: Slot) -> MetadataEntry {
    MetadataEntry(key: directory.headKey(slot.name), value: slot.headText)
  }

  /// The entries that depend on the lease.
  func entries(_ state: State) -> [MetadataEntry] {
    var entries: [MetadataEntry] = []
    for (key, slot) in state.slots where slot.isWanted && slot.isStored {
      entries.append(MetadataEntry(key: key, value: slot.text))
      if slot.isHeadOurs { entries.append(headEntry(slot)) }
    }
    return entries
  }

  // MARK: Lease

  /// Runs `body` with the lease; if that has ended, once more with a new one.
  func withLease<Result>(
    _ call: Call, _ body: (MetadataLease) throws(MooncakeError) -> Result
  ) throws(MooncakeError) -> Result {
    let lease = try lease(call)
    do throws(MooncakeError) {
      return try body(lease)
    } catch {
      if error.code != .notFound { throw error }
      forget(lease)
    }
    return try body(try self.lease(call))
  }

  private func lease(_ call: Call) throws(MooncakeError) -> MetadataLease {
    let (present, isStopping) = state.withLock { ($0.keeper.lease, $0.isStopping) }
    if isStopping { throw Self.closed }
    if let present { return present }
    let asked = directory.now()
    guard let new = try store.grant(ttlMilliseconds: directory.ttlMilliseconds, call) else {
      throw MooncakeError(
        .unsupported,
        "metadata \(directory.uri): this server keeps no leases and lists nothing: the store needs "
          + "mooncake metadata serve, etcd or Redis")
    }
    return state.withLock { $0.keeper.granted(new, at: asked) } ?? new
  }

  /// Nothing depends on that lease any more.
  func forget(_ lease: MetadataLease?) {
    state.withLock { state in
      guard state.keeper.forget(lease) else { return }
      for key in state.slots.keys { state.slots[key]?.isStored = false }
    }
  }

  private static var closed: MooncakeError { MooncakeError(.invalidHandle, "the store was closed") }

  // MARK: Thread

  private func start() throws(MooncakeError) {
    do throws(Errno) {
      try state.withLock { state throws(Errno) in
        if state.thread != nil || state.isStopping || !hasThread { return }
        state.keeper.begin(at: directory.now())
        // Keeps this object alive until `stop`.
        state.thread = try WorkerThread.start(name: "mc-store") { self.run() }
      }
    } catch {
      throw MooncakeError(.system, "cannot start the thread for records: \(error)")
    }
  }
}
