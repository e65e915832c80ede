import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// The thread's work: first the lease, then the names, then records that the service lacks.
extension RecordKeeper {
  /// Names checked per request.
  private static let pageCount = 128

  func run() {
    while !Waiting.sleep(
      until: Deadline(nanoseconds: Clock.now() &+ pause()),
      cancellation: stopping.descriptor.rawValue)
    {
      do throws(MooncakeError) {
        let isSound = try step()
        let now = directory.now()
        if state.withLock({ $0.keeper.succeeded(at: now, isFinished: isSound) }) {
          Log.info("metadata \(directory.uri) can be reached again")
        }
      } catch {
        let now = directory.now()
        if state.withLock({ $0.keeper.failed(at: now) }) && error.code != .canceled {
          Log.warning(
            "\(error.message) (transfers go on; what this process holds is published again as soon "
              + "as the service can be reached)")
        }
      }
    }
  }

  /// Until the next round. Its time is on the directory's clock, which cannot be slept on.
  private func pause() -> UInt64 {
    let (now, next) = (directory.now(), state.withLock { $0.keeper.next })
    return next - min(next, now)
  }

  /// One round; false if something was lost, so that another round is due soon.
  package func step() throws(MooncakeError) -> Bool {
    let isSound = try renew()
    // Before records are put again: a payload removed meanwhile must not come back.
    var failure: MooncakeError?
    let removed = try lookAtNames(&failure)
    withdraw(removed)
    let keys = Set(removed.map { directory.holderKey($0) })
    let waiting = state.withLock { $0.slots.filter { !$0.value.isStored }.map(\.key).sorted() }
    for key in waiting where !keys.contains(key) {
      try renewIfDue()
      try apart(&failure) { () throws(MooncakeError) in try settle(key, call) }
    }
    let isNews = state.withLock { !$0.isHindered.exchange(failure != nil) }
    if isNews, let failure {
      Log.warning("\(failure.message) (all else that this process holds is published)")
    }
    if let handler = state.withLock({ $0.onTurn }) {
      try renewIfDue()
      handler(call)
    }
    return isSound
  }

  /// Does the work for one key. An obstacle there must not hold up the others.
  private func apart(
    _ failure: inout MooncakeError?, _ body: () throws(MooncakeError) -> Void
  ) throws(MooncakeError) {
    do throws(MooncakeError) { try body() } catch {
      switch error.code {
      case .protocolViolation, .invalidArgument, .full: failure = failure ?? error
      default: throw error
      }
    }
  }

  private var call: Call {
    Call(
      until: .after(milliseconds: state.withLock { $0.keeper.callMilliseconds }),
      cancellation: stopping.descriptor.rawValue)
  }

  // MARK: Lease

  /// Renews the lease before anything else; false if an entry is gone.
  private func renew() throws(MooncakeError) -> Bool {
    let now = directory.now()
    let (lease, entries) = state.withLock { ($0.keeper.lease, self.entries($0)) }
    var isSound = true
    var strays: [String] = []
    if lease != nil && !entries.isEmpty {
      switch try store.renew(lease, entries, strays: &strays, call) {
      case .kept: break
      case .gone:
        forget(lease)
        isSound = false
      case .lost(let keys):
        // A missing head is dealt with later. An entry taken over by somebody else does not cost
        // the rest.
        state.withLock { state in
          for key in keys where state.slots[key] != nil {
            state.slots[key]?.isStored = false
            isSound = false
          }
        }
      }
    }
    state.withLock { $0.keeper.renewed(lease, at: now) }
    try remove(strays)
    return isSound
  }

  /// Deletes entries on the lease that belong to nothing held here. A put that was never answered
  /// may take effect at any later time, even after its entry was taken back.
  private func remove(_ strays: [String]) throws(MooncakeError) {
    let late = unknown(strays)
    if late.isEmpty { return }
    for (key, value) in zip(late, try store.values(of: late, call)) {
      // It may have been put again meanwhile.
      guard let value, !unknown([key]).isEmpty else { continue }
      Log.info("metadata \(directory.uri): '\(key)' appeared after it was deleted: deleted again")
      try directory.delete(MetadataEntry(key: key, value: value), call)
    }
  }

  /// The keys that belong to nothing held or being taken back here. Heads of names held here are
  /// left out, because other processes see to those.
  private func unknown(_ keys: [String]) -> [String] {
    state.withLock { state in
      var unknown = keys.filter { state.slots[$0] == nil }
      if unknown.contains(where: { $0.utf8.starts(with: directory.headPrefix.utf8) }) {
        let heads = Set(state.slots.values.map { MetadataKey(directory.headKey($0.name)) })
        unknown.removeAll { heads.contains(MetadataKey($0)) }
      }
      return unknown
    }
  }

  /// Between two calls of a round that may take long.
  private func renewIfDue() throws(MooncakeError) {
    let now = directory.now()
    if state.withLock({ $0.keeper.isDue(at: now) }) { _ = try renew() }
  }

  // MARK: Names

  /// What one look at all names needs.
  private struct Look {
    let now: Moment
    let mark: String?
    /// Whether any name has been removed since the last look. Always true for the first one, before
    /// which there may have been looks that nobody knows of.
    let hasNewMark: Bool
    /// nil until it is asked for.
    var hasRemovals: Bool?
    var removed: [HolderRecord] = []
    /// The first obstacle at a single name.
    var failure: MooncakeError?
  }

  private typealias Item = (key: String, slot: Slot)

  /// Checks the head of each payload held here and puts missing ones. Returns what has been
  /// removed.
  private func lookAtNames(
    _ failure: inout MooncakeError?
  ) throws(MooncakeError) -> [HolderRecord] {
    let items: [Item] = state.withLock { state in
      state.slots.filter { $0.value.isWanted && !$0.value.isPublishing }
        .map { ($0.key, $0.value) }.sorted { $0.key < $1.key }
    }
    if items.isEmpty { return [] }
    // Whatever the mark says, it changes with each removal.
    let mark = try store.values(of: [directory.removalMarkKey], call)[0]
    let (looked, former) = state.withLock { ($0.looked, $0.mark) }
    var look = Look(
      now: Moment(directory), mark: mark,
      hasNewMark: mark != nil && (looked == nil || mark != former))
    for start in stride(from: 0, to: items.count, by: Self.pageCount) {
      try renewIfDue()
      try self.look(at: items[start..<min(start + Self.pageCount, items.count)], &look)
    }
    state.withLock { state in
      state.looked = look.now
      state.mark = mark
    }
    failure = look.failure
    return look.removed
  }

  private func look(
    at items: ArraySlice<Item>, _ look: inout Look
  ) throws(MooncakeError) {
    let texts = try store.values(of: items.map { directory.headKey($0.slot.name) }, call)
    var standing: [Item] = []
    var doubtful: [(item: Item, text: String?)] = []
    for (item, text) in zip(items, texts) {
      let head = directory.head(item.slot.name, in: text)
      if let head, head.version == item.slot.record.version {
        let isOurs = text?.utf8.elementsEqual(item.slot.headText.utf8) ?? false
        try note(
          item, isHeadOurs: isOurs, isSuperseded: false, published: head.publishedMilliseconds)
        if item.slot.isUnconfirmed { standing.append(item) }
      } else {
        doubtful.append((item, text))
      }
    }
    let tombstones = try store.values(of: doubtful.map { tombstoneKey($0.item) }, call)
    var failure: MooncakeError?
    for ((item, text), tombstone) in zip(doubtful, tombstones) {
      try apart(&failure) { () throws(MooncakeError) in
        var isRemoved = isTombstone(tombstone, of: item)
        if !isRemoved { isRemoved = try judge(item, text, &look, &standing) }
        if isRemoved { look.removed.append(item.slot.record) }
      }
      try renewIfDue()
    }
    look.failure = look.failure ?? failure
    if !standing.isEmpty { try confirm(standing, &look) }
  }

  /// Somebody may have removed a name, and found no head, just before this process put one.
  private func confirm(_ items: [Item], _ look: inout Look) throws(MooncakeError) {
    look.hasRemovals = try directory.hasRemovals(call)
    for item in items {
      if look.hasRemovals == true,
        try directory.removals(of: item.slot.name, call).cover(item.slot.record.summary)
      {
        try directory.delete(headEntry(item.slot), call)
        look.removed.append(item.slot.record)
      }
      state.withLock { $0.slots[item.key]?.isUnconfirmed = false }
    }
  }

  private func tombstoneKey(_ item: Item) -> String {
    directory.tombstoneKey(item.slot.name, item.slot.record.version)
  }

  private func isTombstone(_ text: String?, of item: Item) -> Bool {
    guard let text else { return false }
    // Another release wrote the text, but the key names the version.
    guard let tombstone = try? Tombstone(json: text) else { return true }
    return tombstone.version == item.slot.record.version
      && item.slot.record.publishedMilliseconds <= tombstone.untilMilliseconds
  }

  /// Decides about a holding whose version is not the one under its name. Returns whether that
  /// version has been removed.
  private func judge(
    _ item: Item, _ text: String?, _ look: inout Look, _ standing: inout [Item]
  ) throws(MooncakeError) -> Bool {
    let record = item.slot.record
    let head = directory.head(record.name, in: text)
    if let text, let head {
      if record.summary.isOlder(than: head.summary)
        || head.publishedMilliseconds >= record.publishedMilliseconds
      {
        // Once this holding is the older one, it never stands for the name again.
        try note(item, isHeadOurs: false, isSuperseded: true)
        return false
      }
      if !record.isComplete || record.isSuperseded {
        try note(item, isHeadOurs: false)
        return false
      }
      // That head is from a holder of an older version that did not know of this one.
      try directory.delete(
        MetadataEntry(key: directory.headKey(record.name), value: text), call)
    } else if record.isSuperseded {
      try note(item, isHeadOurs: false)
      return false
    } else if mayHaveMissedRemoval(item.slot, look) {
      Log.warning(
        "payload '\(record.name)': it may have been removed while the metadata service was out of "
          + "reach for more than \(StoreDirectory.removalMilliseconds / 60_000) minutes: it is "
          + "not published again")
      return true
    }
    if look.hasRemovals == nil { look.hasRemovals = try directory.hasRemovals(call) }
    if look.hasRemovals == true,
      try directory.removals(of: record.name, call).cover(record.summary)
    {
      return true
    }
    // Nobody can read this head: it is left to whoever registers or removes the name.
    try stand(item, isAllowed: text == nil || head != nil, &standing)
    return false
  }

  /// Puts a head that names this holding, if there is none.
  private func stand(
    _ item: Item, isAllowed: Bool, _ standing: inout [Item]
  ) throws(MooncakeError) {
    let record = item.slot.record
    var isPut = false
    if record.isComplete && isAllowed {
      // An older version must not take the name while somebody holds a newer one.
      let isNewest = try !directory.versions(of: record.name, call).contains {
        $0.isCurrent && $0.version != record.version && record.summary.isOlder(than: $0.summary)
      }
      if isNewest {
        // Even if the put is not answered.
        state.withLock { $0.slots[item.key]?.isUnconfirmed = true }
        isPut = try withLease(call) { lease throws(MooncakeError) in
          try store.putIfAbsent(headEntry(item.slot), lease: lease, call)
        }
      }
    }
    if isPut { standing.append(item) }
    try note(item, isHeadOurs: isPut)
  }

  /// Whether a removal may have been forgotten before this process saw it: it was out of touch for
  /// longer than removals are remembered, and names have been removed meanwhile.
  private func mayHaveMissedRemoval(_ slot: Slot, _ look: Look) -> Bool {
    guard look.hasNewMark else { return false }
    let away = [slot.since, state.withLock { $0.looked }].compactMap {
      $0.map { look.now.milliseconds(since: $0) }
    }
    return away.min()! >= StoreDirectory.removalMilliseconds
  }

  /// Stores what was found out about a holding.
  private func note(
    _ item: Item, isHeadOurs: Bool, isSuperseded: Bool? = nil, published: UInt64 = 0
  ) throws(MooncakeError) {
    let isLate = state.withLock { state in
      guard var slot = state.slots[item.key], slot.isWanted else { return true }
      // A head published meanwhile is newer than what was seen here.
      if slot.isHeadOurs == item.slot.isHeadOurs { slot.isHeadOurs = isHeadOurs }
      var record = slot.record
      record.isSuperseded = isSuperseded ?? record.isSuperseded
      record.summary.publishedMilliseconds = max(record.publishedMilliseconds, published)
      if record != slot.record {
        state.lastEdition &+= 1
        slot.record = record
        slot.edition = state.lastEdition
        slot.isStored = false
      }
      state.slots[item.key] = slot
      return false
    }
    if isLate && isHeadOurs { try directory.delete(headEntry(item.slot), call) }
  }

  // MARK: Removal

  /// Calls the handler on another thread, because it waits for readers and the lease must not.
  private func withdraw(_ records: [HolderRecord]) {
    guard !records.isEmpty, let handler = state.withLock({ $0.onRemoval }) else { return }
    if !hasThread {
      for record in records { handler(record) }
      return
    }
    if isWithdrawing.exchange(true, ordering: .acquiringAndReleasing) { return }
    state.withLock { $0.withdrawal.take() }?.join()
    do throws(Errno) {
      let thread = try WorkerThread.start(name: "mc-store-remove") {
        for record in records { handler(record) }
        self.isWithdrawing.store(false, ordering: .releasing)
      }
      state.withLock { $0.withdrawal = thread }
    } catch {
      isWithdrawing.store(false, ordering: .releasing)
      Log.warning("removed payloads are withdrawn later, no thread could be started: \(error)")
    }
  }
}

extension Bool {
  /// Sets a value and returns the previous one.
  fileprivate mutating func exchange(_ value: Bool) -> Bool {
    defer { self = value }
    return self
  }
}
