/// Limits of a metadata server.
package struct MetadataLimits: Sendable {
  package var keyBytes = 2048
  package var valueBytes = 16 << 20
  /// Bytes of a list of keys in one request; bounded because the only thread parses it.
  package var questionBytes = 2 << 20
  /// Bytes of keys and values with their overhead.
  package var totalBytes = 1 << 30
  package var leaseCount = 100_000
  /// Changes kept for watchers.
  package var historyCount = 4096
  package var historyBytes = 8 << 20
  package var connectionCount = 2048
  /// Leaves the rest for others.
  package var connectionsPerHost = 1536
  /// Time for a whole request, for the client to take a whole answer, and for silence in between.
  package var requestMilliseconds: UInt64 = 60_000
  /// Slower connections may be closed if others need their place.
  package var graceMilliseconds: UInt64 = 1000
  /// Limit on the bytes of incoming values, and separately of answers that clients have not taken.
  package var passingBytes = 256 << 20

  package init() {}
}

/// The keys, leases and latest changes of a metadata server; without threads, sockets or a clock.
package struct MetadataTable {
  package struct Entry: Sendable {
    package var value: [UInt8]
    /// 0 for none.
    package var lease: UInt64
  }

  package struct Lease: Sendable {
    package var ttlMilliseconds: UInt64
    /// When it expires on `Clock`, in nanoseconds.
    package var expiry: UInt64
    package var keys: Set<MetadataKey> = []
  }

  /// A change; without a value, the key was deleted.
  package struct Change: Sendable {
    package var revision: UInt64
    package var key: MetadataKey
    package var value: [UInt8]?
  }

  package enum Verdict: Equatable, Sendable { case done, exists, noLease, tooLarge, full }

  /// Approximate overhead of an entry.
  private static let overheadBytes = 256

  package let limits: MetadataLimits
  /// Counts changes. It starts at the current time, so that it never repeats after a restart.
  package private(set) var revision: UInt64
  package private(set) var usedBytes = 0
  package private(set) var leases: [UInt64: Lease] = [:]
  private var entries: [MetadataKey: Entry] = [:]
  /// Every key in order; empty during a restore.
  private var order: [MetadataKey] = []
  private var isRestoring = false
  private var history: [Change] = []
  private var historyBytes = 0
  /// No lease ends before this time.
  private var earliestExpiry = UInt64.max

  package init(revision: UInt64, limits: MetadataLimits = MetadataLimits()) {
    self.revision = revision
    self.limits = limits
  }

  package var count: Int { entries.count }
  package var allEntries: [(key: MetadataKey, entry: Entry)] {
    order.map { ($0, entries[$0]!) }
  }

  // MARK: Keys

  package func value(of key: MetadataKey) -> [UInt8]? { entries[key]?.value }

  package mutating func put(
    _ key: MetadataKey, _ value: [UInt8], lease: UInt64 = 0, isOnlyIfAbsent: Bool = false
  ) -> Verdict {
    let old = entries[key]
    if isOnlyIfAbsent && old != nil { return .exists }
    if lease != 0 && leases[lease] == nil { return .noLease }
    if key.text.utf8.count > limits.keyBytes || value.count > limits.valueBytes {
      return .tooLarge
    }
    if usedBytes + growth(of: old, key, value) > limits.totalBytes { return .full }
    store(key, value, lease)
    return .done
  }

  /// Until `finishRestore`, nothing may be listed or watched.
  package mutating func startRestore() { isRestoring = true }

  package mutating func finishRestore() {
    isRestoring = false
    order = MetadataKey.sorted(entries.keys)
  }

  /// Puts an entry regardless of limits, since a server with other limits may have accepted it;
  /// false if there is no such lease.
  package mutating func restore(_ key: MetadataKey, _ value: [UInt8], lease: UInt64) -> Bool {
    if lease != 0 && leases[lease] == nil { return false }
    store(key, value, lease)
    return true
  }

  private func growth(of old: Entry?, _ key: MetadataKey, _ value: [UInt8]) -> Int {
    old.map { value.count - $0.value.count } ?? cost(key, value)
  }

  private mutating func store(_ key: MetadataKey, _ value: [UInt8], _ lease: UInt64) {
    let old = entries.updateValue(Entry(value: value, lease: lease), forKey: key)
    usedBytes += growth(of: old, key, value)
    if let old {
      if old.lease != lease { leases[old.lease]?.keys.remove(key) }
    } else if !isRestoring {
      order.insert(key, at: place(of: key))
    }
    if lease != 0 { leases[lease]?.keys.insert(key) }
    note(key, value)
  }

  /// Deletes a key if it has a value; returns whether it had.
  package mutating func delete(_ key: MetadataKey, ifItIs value: [UInt8]) -> Bool {
    entries[key]?.value == value && delete(key)
  }

  /// Deletes a key; returns whether it was there.
  package mutating func delete(_ key: MetadataKey) -> Bool {
    if !forget(key) { return false }
    if !isRestoring { order.remove(at: place(of: key)) }
    return true
  }

  /// Deletes a key everywhere but in `order`.
  private mutating func forget(_ key: MetadataKey) -> Bool {
    guard let old = entries.removeValue(forKey: key) else { return false }
    usedBytes -= cost(key, old.value)
    leases[old.lease]?.keys.remove(key)
    note(key, nil)
    return true
  }

  /// Deletes existing keys, given in order, in a single pass: deleting them one by one would each
  /// time move all later ones.
  private mutating func delete(_ keys: [MetadataKey]) {
    guard let first = keys.first else { return }
    for key in keys { _ = forget(key) }
    if isRestoring { return }
    var kept = place(of: first)
    var next = 0
    for index in kept..<order.count {
      if next < keys.count, order[index] == keys[next] {
        next += 1
      } else {
        order.swapAt(kept, index)
        kept += 1
      }
    }
    order.removeLast(order.count - kept)
  }

  /// Keys with a prefix after a position, in order, limited in number and bytes.
  package func list(
    prefix: String, after position: String?, limit: Int, byteLimit: Int
  ) -> (entries: [(key: MetadataKey, value: [UInt8])], isCut: Bool) {
    var index = place(of: MetadataKey(prefix))
    if let position { index = max(index, place(of: MetadataKey(position))) }
    var found: [(key: MetadataKey, value: [UInt8])] = []
    var byteCount = 0
    while index < order.count, order[index].text.utf8.starts(with: prefix.utf8) {
      let key = order[index]
      index += 1
      if let position, key == MetadataKey(position) { continue }
      guard let entry = entries[key] else { continue }
      if found.count == limit || byteCount > byteLimit { return (found, true) }
      byteCount += cost(key, entry.value)
      found.append((key, entry.value))
    }
    return (found, false)
  }

  private func cost(_ key: MetadataKey, _ value: [UInt8]) -> Int {
    key.text.utf8.count + value.count + Self.overheadBytes
  }

  /// Where a key is, or would be inserted.
  private func place(of key: MetadataKey) -> Int {
    var low = 0
    var high = order.count
    while low < high {
      let middle = (low + high) / 2
      if order[middle] < key { low = middle + 1 } else { high = middle }
    }
    return low
  }

  // MARK: Changes

  /// Changes of keys with a prefix since a revision; nil if they are no longer kept.
  package func changes(prefix: String, since state: UInt64) -> [Change]? {
    let oldest = history.first?.revision ?? revision &+ 1
    guard state <= revision, state &+ 1 >= oldest else { return nil }
    // Revisions in the history have no gaps.
    return history[Int(state &+ 1 - oldest)...].filter {
      $0.key.text.utf8.starts(with: prefix.utf8)
    }
  }

  private mutating func note(_ key: MetadataKey, _ value: [UInt8]?) {
    if isRestoring { return }
    revision &+= 1
    history.append(Change(revision: revision, key: key, value: value))
    historyBytes += cost(key, value ?? [])
    // In batches, because removing from the front moves everything.
    guard history.count > limits.historyCount * 2 || historyBytes > limits.historyBytes * 2 else {
      return
    }
    var drop = 0
    while drop < history.count,
      history.count - drop > limits.historyCount || historyBytes > limits.historyBytes
    {
      historyBytes -= cost(history[drop].key, history[drop].value ?? [])
      drop += 1
    }
    history.removeFirst(drop)
  }

  // MARK: Leases

  /// Returns false if there are too many leases or the number is taken.
  package mutating func grant(_ id: UInt64, ttlMilliseconds: UInt64, now: UInt64) -> Bool {
    if leases.count >= limits.leaseCount { return false }
    return restoreLease(id, ttlMilliseconds: ttlMilliseconds, now: now)
  }

  /// Grants a lease regardless of limits, since a server with other limits may have granted it;
  /// false if the number is taken.
  package mutating func restoreLease(_ id: UInt64, ttlMilliseconds: UInt64, now: UInt64) -> Bool {
    if id == 0 || leases[id] != nil { return false }
    let expiry = now &+ ttlMilliseconds &* 1_000_000
    leases[id] = Lease(ttlMilliseconds: ttlMilliseconds, expiry: expiry)
    earliestExpiry = min(earliestExpiry, expiry)
    return true
  }

  /// Gives a lease its full time again; nil if there is none.
  package mutating func renew(_ id: UInt64, now: UInt64) -> Lease? {
    guard var lease = leases.removeValue(forKey: id) else { return nil }
    lease.expiry = now &+ lease.ttlMilliseconds &* 1_000_000
    leases[id] = lease
    return lease
  }

  /// Ends a lease and deletes its keys; false if there is none.
  package mutating func revoke(_ id: UInt64) -> Bool {
    if leases[id] == nil { return false }
    revoke([id])
    return true
  }

  /// Ends leases, all of which exist, and deletes their keys.
  package mutating func revoke(_ ids: [UInt64]) {
    let keys = ids.flatMap { leases.removeValue(forKey: $0)?.keys ?? [] }.sorted()
    // Searching for a few keys is faster than passing over all.
    if keys.count > 8 { return delete(keys) }
    for key in keys { _ = delete(key) }
  }

  /// When to call `expire`, in nanoseconds on `Clock`.
  package var nextExpiry: UInt64 { leases.isEmpty ? .max : earliestExpiry }

  /// Leases that have expired and are still to be revoked.
  package mutating func expired(now: UInt64) -> [UInt64] {
    if now < nextExpiry { return [] }
    earliestExpiry = leases.values.lazy.map(\.expiry).filter { $0 > now }.min() ?? .max
    return leases.filter { $0.value.expiry <= now }.map(\.key).sorted()
  }

  /// Gives every lease its full time from now on.
  package mutating func renewAll(now: UInt64) {
    leases = leases.mapValues { lease in
      var lease = lease
      lease.expiry = now &+ lease.ttlMilliseconds &* 1_000_000
      return lease
    }
    earliestExpiry = leases.values.lazy.map(\.expiry).min() ?? .max
  }

  /// Gives every lease more time, since nobody could renew while the server did not run.
  package mutating func postpone(nanoseconds: UInt64) {
    leases = leases.mapValues { lease in
      var lease = lease
      lease.expiry &+= nanoseconds
      return lease
    }
    if earliestExpiry != .max { earliestExpiry &+= nanoseconds }
  }
}
