import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Keeps what a process publishes about its holdings true: one lease for all records, renewed by
/// one thread, `mc-store`, which puts again what the service has lost and sees to it that the name
/// of each payload that is here leads to somebody.
///
/// Calls talk to the service on their caller's thread and wait for nobody else; what fails is
/// repeated by the thread.
package final class RecordKeeper: Sendable {
  private struct Slot: Sendable {
    var record: HolderRecord
    /// Differs for each change of the record.
    var edition: UInt64
    /// False: it is to be deleted.
    var isWanted = true
    /// Whether the service has taken it as it is here.
    var isStored = false
    /// Whether the payload's head names this holding.
    var isHeadOurs = false
    /// Whether the name has got another version since.
    var isSuperseded = false

    /// What stands under the payload's name when this holding stands for it.
    var head: PayloadHead { PayloadHead(record.summary, origin: record.holder) }
  }

  private struct State: Sendable {
    /// By key.
    var slots: [String: Slot] = [:]
    var lease: MetadataLease?
    var lastEdition: UInt64 = 0
    var isDown = false
    var isStopping = false
    var onRemoval: (@Sendable (String) -> Void)?
    var thread: WorkerThread?
    var withdrawal: WorkerThread?
  }

  private let directory: StoreDirectory
  private let state = Lock(State())
  private let stopping: EventFD
  private let isWithdrawing = Atomic(false)

  private static let firstBackoffMilliseconds: UInt64 = 100
  private static let maximumBackoffMilliseconds: UInt64 = 1000
  private static let removalMilliseconds: UInt64 = 2000

  package init(_ directory: StoreDirectory) throws(EngineError) {
    self.directory = directory
    do throws(Errno) { stopping = try EventFD() } catch {
      throw EngineError(.system, "making an event for records: \(error)")
    }
  }

  /// Says what to do when somebody removes the name of a payload that is held here. The handler
  /// runs on a thread of its own, and again until the record is removed.
  package func onRemoval(_ handler: @escaping @Sendable (_ name: String) -> Void) {
    state.withLock { $0.onRemoval = handler }
  }

  private var store: any MetadataStore { directory.store }

  // MARK: Calls

  /// Publishes a holding and makes the payload's name lead to it. Throws `exists` if the name is
  /// taken and only a new one is wanted; after an error nothing stays published.
  package func publish(
    _ record: HolderRecord, isCreateOnly: Bool, _ call: MetadataCall
  ) throws(EngineError) {
    let key = directory.holderKey(record)
    try start()
    note(record, key)
    do throws(EngineError) {
      try settle(key, call)
      if try directory.removedVersion(record.name, call) == record.version {
        _ = try store.delete(directory.tombstoneKey(record.name), call)
      }
      let head = PayloadHead(record.summary, origin: record.holder)
      let entry = MetadataEntry(key: directory.headKey(record.name), value: head.json)
      let isPut = try withLease(call) { lease throws(EngineError) in
        if isCreateOnly { return try store.putIfAbsent(entry, lease: lease, call) }
        try store.put(entry, lease: lease, call)
        return true
      }
      if !isPut {
        throw EngineError(
          .exists,
          "payload '\(record.name)': the name is taken in metadata \(directory.uri): choose "
            + "another, or do not ask for create-only")
      }
      state.withLock { $0.slots[key]?.isHeadOurs = true }
    } catch {
      remove(record, call)
      throw error
    }
  }

  /// Publishes a holding, or what has changed about it.
  package func put(_ record: HolderRecord, _ call: MetadataCall) {
    let key = directory.holderKey(record)
    do throws(EngineError) {
      try start()
      note(record, key)
      try settle(key, call)
    } catch {
      Log.warning("payload '\(record.name)': its record is put later: \(error.message)")
    }
  }

  /// Takes a holding back, and the payload's head if it names this one.
  package func remove(_ record: HolderRecord, _ call: MetadataCall) {
    let key = directory.holderKey(record)
    let isKnown = state.withLock { state in
      guard state.slots[key] != nil else { return false }
      state.lastEdition &+= 1
      state.slots[key]?.edition = state.lastEdition
      state.slots[key]?.isWanted = false
      // Should deleting it fail, the thread does it.
      state.slots[key]?.isStored = false
      return true
    }
    if !isKnown { return }
    do throws(EngineError) {
      try settle(key, call)
    } catch {
      Log.info("payload '\(record.name)': its record is deleted later: \(error.message)")
    }
  }

  /// Ends the thread and removes everything that was put. No handler runs afterwards, except the
  /// one that calls this.
  package func stop() {
    let (isFirst, thread) = state.withLock { state in
      defer { state.isStopping = true }
      return (!state.isStopping, state.thread.take())
    }
    if !isFirst { return }
    stopping.signal()
    thread?.join()
    // Only the thread that has ended would start another one.
    let withdrawal = state.withLock { $0.withdrawal.take() }
    if let withdrawal, !withdrawal.isCurrent { withdrawal.join() }
    let (entries, lease, isDown) = state.withLock { state in
      defer { state.slots = [:] }
      return (self.entries(state), state.lease, state.isDown)
    }
    if lease == nil { return }
    do throws(EngineError) {
      try store.revoke(
        lease, entries,
        MetadataCall(until: .after(milliseconds: Self.removalMilliseconds / (isDown ? 4 : 1))))
    } catch {
      Log.warning("records of payloads stay until their lease ends: \(error.message)")
    }
  }

  // MARK: Records

  private func note(_ record: HolderRecord, _ key: String) {
    state.withLock { state in
      state.lastEdition &+= 1
      var slot = state.slots[key] ?? Slot(record: record, edition: 0)
      slot.record = record
      slot.edition = state.lastEdition
      slot.isWanted = true
      slot.isStored = false
      state.slots[key] = slot
    }
  }

  /// Brings the service's record to what it is to be. Another thread may do the same: whoever finds
  /// that it put what is no longer wanted goes on until it is right.
  private func settle(_ key: String, _ call: MetadataCall) throws(EngineError) {
    var didPut = false
    while true {
      guard let slot = state.withLock({ $0.slots[key] }) else {
        if didPut { _ = try store.delete(key, call) }
        return
      }
      if slot.isWanted {
        let entry = MetadataEntry(key: key, value: slot.record.json)
        try withLease(call) { lease throws(EngineError) in
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

  private func headEntry(_ slot: Slot) -> MetadataEntry {
    MetadataEntry(key: directory.headKey(slot.record.name), value: slot.head.json)
  }

  /// What hangs on the lease.
  private func entries(_ state: State) -> [MetadataEntry] {
    var entries: [MetadataEntry] = []
    for (key, slot) in state.slots where slot.isWanted && slot.isStored {
      entries.append(MetadataEntry(key: key, value: slot.record.json))
      if slot.isHeadOurs { entries.append(headEntry(slot)) }
    }
    return entries
  }

  // MARK: Lease

  /// Runs `body` with the lease; once more with a new one if it has ended.
  private func withLease<Result>(
    _ call: MetadataCall, _ body: (MetadataLease) throws(EngineError) -> Result
  ) throws(EngineError) -> Result {
    let lease = try lease(call)
    do throws(EngineError) {
      return try body(lease)
    } catch {
      if error.code != .notFound { throw error }
      state.withLock { state in
        if state.lease == lease { state.lease = nil }
        for key in state.slots.keys { state.slots[key]?.isStored = false }
      }
    }
    return try body(try self.lease(call))
  }

  private func lease(_ call: MetadataCall) throws(EngineError) -> MetadataLease {
    let (present, isStopping) = state.withLock { ($0.lease, $0.isStopping) }
    if isStopping { throw EngineError(.invalidHandle, "the store was closed") }
    if let present { return present }
    guard let new = try store.grant(ttlMilliseconds: directory.ttlMilliseconds, call) else {
      throw EngineError(
        .unsupported,
        "metadata \(directory.uri): this server keeps no leases and lists nothing: the store needs "
          + "mooncake metadata serve, etcd or Redis")
    }
    // Where two make one, the other ends unused.
    return state.withLock { state in
      if state.lease == nil { state.lease = new }
      return state.lease!
    }
  }

  // MARK: Thread

  private func start() throws(EngineError) {
    do throws(Errno) {
      try state.withLock { state throws(Errno) in
        if state.thread != nil || state.isStopping { return }
        // Keeps this alive until `stop`.
        state.thread = try WorkerThread.start(name: "mc-store") { self.run() }
      }
    } catch {
      throw EngineError(.system, "cannot start the thread for records: \(error)")
    }
  }

  private func run() {
    var pause = directory.ttlMilliseconds / 3
    var backoff: UInt64 = 0
    while !Waiting.sleep(
      until: .after(milliseconds: pause), cancellation: stopping.descriptor.rawValue)
    {
      do throws(EngineError) {
        let isSound = try step()
        backoff = 0
        pause = isSound ? directory.ttlMilliseconds / 3 : Self.firstBackoffMilliseconds
        if state.withLock({ $0.isDown.exchange(false) }) {
          Log.info("metadata \(directory.uri) can be reached again")
        }
      } catch {
        backoff = min(
          Self.maximumBackoffMilliseconds, max(Self.firstBackoffMilliseconds, backoff * 2))
        pause = backoff
        if !state.withLock({ $0.isDown.exchange(true) }) && error.code != .canceled {
          Log.warning(
            "\(error.message) (transfers go on; what this process holds is published again as soon "
              + "as the service can be reached)")
        }
      }
    }
  }

  /// One renewal; false if something had been lost, so that another one is due soon.
  private func step() throws(EngineError) -> Bool {
    for key in state.withLock({ $0.slots.filter { !$0.value.isStored }.map(\.key) }) {
      try settle(key, call)
    }
    var removed: [String] = []
    for (key, slot) in state.withLock({ $0.slots }) where slot.isWanted {
      if try tend(key, slot) { removed.append(slot.record.name) }
    }
    withdraw(removed)
    let (lease, entries) = state.withLock { ($0.lease, self.entries($0)) }
    if lease == nil || entries.isEmpty { return true }
    if try store.renew(lease, entries, call) { return true }
    state.withLock { state in
      for key in state.slots.keys { state.slots[key]?.isStored = false }
    }
    return false
  }

  private var call: MetadataCall {
    MetadataCall(
      until: .after(milliseconds: max(1000, directory.ttlMilliseconds * 3 / 10)),
      cancellation: stopping.descriptor.rawValue)
  }

  /// Looks at the head of a payload that is held here, and puts one that is missing. Returns
  /// whether the payload has been removed.
  private func tend(_ key: String, _ slot: Slot) throws(EngineError) -> Bool {
    let own = headEntry(slot)
    let text = try store.get(own.key, call)
    var now = slot
    now.isHeadOurs = text.map { $0.utf8.elementsEqual(own.value.utf8) } ?? false
    let head = text.flatMap { try? PayloadHead(json: $0) }
    if head?.version == slot.record.version {
      now.isSuperseded = false
    } else if text == nil || head != nil {
      if try directory.removedVersion(slot.record.name, call) == slot.record.version { return true }
      if let head {
        // Somebody else's; once this holding is the older one it never stands for the name again.
        if head.publishedMilliseconds >= slot.record.publishedMilliseconds {
          now.isSuperseded = true
        }
      } else if slot.record.isComplete && !slot.isSuperseded {
        now.isHeadOurs = try withLease(call) { lease throws(EngineError) in
          try store.putIfAbsent(own, lease: lease, call)
        }
      }
    }
    let isLate = state.withLock { state in
      guard let present = state.slots[key], present.isWanted else { return true }
      // A head that has been published meanwhile is newer than what was seen here.
      if present.isHeadOurs == slot.isHeadOurs { state.slots[key]?.isHeadOurs = now.isHeadOurs }
      state.slots[key]?.isSuperseded = now.isSuperseded
      return false
    }
    if isLate && now.isHeadOurs { try directory.delete(own, call) }
    return false
  }

  /// Tells the handler, apart from this thread: it waits for readers, and the lease must not.
  private func withdraw(_ names: [String]) {
    guard !names.isEmpty, let handler = state.withLock({ $0.onRemoval }),
      !isWithdrawing.exchange(true, ordering: .acquiringAndReleasing)
    else { return }
    state.withLock { $0.withdrawal.take() }?.join()
    do throws(Errno) {
      let thread = try WorkerThread.start(name: "mc-store-remove") {
        for name in names { handler(name) }
        self.isWithdrawing.store(false, ordering: .releasing)
      }
      state.withLock { $0.withdrawal = thread }
    } catch {
      isWithdrawing.store(false, ordering: .releasing)
      Log.warning("removed payloads are withdrawn later: no thread: \(error)")
    }
  }
}

extension Bool {
  /// Sets a value and returns the one before.
  fileprivate mutating func exchange(_ value: Bool) -> Bool {
    defer { self = value }
    return self
  }
}
