import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import Synchronization

/// A metadata service in memory. Before each call, the test is asked what becomes of it, how long
/// it takes and what happens meanwhile.
final class ScriptedService: Sendable {
  /// What becomes of a call.
  enum Fate { case done, unreachable, answerLost }

  private struct Lease {
    let ttl: UInt64
    var end: UInt64
  }

  private struct State {
    var table: [MetadataKey: (value: String, lease: UInt64)] = [:]
    /// The keys of the table, in order.
    var keys: [MetadataKey] = []
    var revision: UInt64 = 1
    var log: [(revision: UInt64, change: MetadataChange)] = []
    var forgotten: UInt64 = 0
    var leases: [UInt64: Lease] = [:]
    var lastLease: UInt64 = 0
    var lostLeaseCount = 0
    var refused: Set<MetadataKey> = []
    var callCount = 0
    var renewals: [UInt64] = []
  }
  private let state = Lock(State())
  let now: @Sendable () -> UInt64

  init(now: @escaping @Sendable () -> UInt64 = { Clock.now() }) { self.now = now }

  var callCount: Int { state.withLock { $0.callCount } }
  /// Leases that expired without renewal.
  var lostLeaseCount: Int { state.withLock { $0.lostLeaseCount } }
  var keyCount: Int { state.withLock { $0.table.count } }
  /// When leases were renewed.
  var renewals: [UInt64] { state.withLock { $0.renewals } }

  /// Drops the changes up to now, as etcd does when it compacts.
  func compact() { state.withLock { $0.forgotten = $0.revision } }

  /// Comes back empty and counts from the time of day, as our server does.
  func loseEverything() {
    let now = now()
    state.withLock { state in
      // Real lease numbers are random.
      let last = state.lastLease
      state = State()
      state.lastLease = last
      state.revision = now
      state.forgotten = now
    }
  }

  private func access<Result>(_ body: (inout State) -> Result) -> Result {
    let now = now()
    return state.withLock { state in
      state.callCount += 1
      for id in state.leases.filter({ $0.value.end <= now }).keys.sorted() {
        state.lostLeaseCount += 1
        Self.end(id, &state)
      }
      return body(&state)
    }
  }

  private static func end(_ lease: UInt64, _ state: inout State) {
    state.leases[lease] = nil
    for key in state.table.filter({ $0.value.lease == lease }).keys.sorted() {
      remove(key, &state)
    }
  }

  private static func remove(_ key: MetadataKey, _ state: inout State) {
    guard state.table.removeValue(forKey: key) != nil else { return }
    state.keys.remove(at: place(of: key, state))
    state.revision += 1
    state.log.append((state.revision, .delete(key: key.text)))
  }

  /// Where a key is, or would be inserted.
  private static func place(of key: MetadataKey, _ state: State) -> Int {
    var (low, high) = (0, state.keys.count)
    while low < high {
      let middle = (low + high) / 2
      if state.keys[middle] < key { low = middle + 1 } else { high = middle }
    }
    return low
  }

  func get(_ key: String) -> String? { access { $0.table[MetadataKey(key)]?.value } }

  func values(_ keys: ArraySlice<String>) -> [String?] {
    access { state in keys.map { state.table[MetadataKey($0)]?.value } }
  }

  enum Verdict { case done, exists, noLease, refused }

  /// From now on, puts of this key fail.
  func refuse(_ key: String) { state.withLock { _ = $0.refused.insert(MetadataKey(key)) } }

  func put(_ entry: MetadataEntry, _ lease: MetadataLease?, isOnlyIfAbsent: Bool) -> Verdict {
    access { state in
      let key = MetadataKey(entry.key)
      if state.refused.contains(key) { return .refused }
      if isOnlyIfAbsent && state.table[key] != nil { return .exists }
      if let lease, state.leases[lease.id] == nil { return .noLease }
      if state.table[key] == nil { state.keys.insert(key, at: Self.place(of: key, state)) }
      state.table[key] = (entry.value, lease?.id ?? 0)
      state.revision += 1
      state.log.append((state.revision, .put(entry)))
      return .done
    }
  }

  /// Whether a head that names a holder was ever put.
  func hasPut(_ key: String, by holder: HolderAddress) -> Bool {
    state.withLock { state in
      state.log.contains {
        guard case .put(let entry) = $0.change, MetadataKey(entry.key) == MetadataKey(key) else {
          return false
        }
        return (try? PayloadHead(json: entry.value))?.origin == holder
      }
    }
  }

  /// Deletes a key, if given only with this value.
  func delete(_ key: String, ifIs value: String? = nil) -> Bool {
    access { state in
      guard let present = state.table[MetadataKey(key)], value ?? present.value == present.value
      else { return false }
      Self.remove(MetadataKey(key), &state)
      return true
    }
  }

  func list(_ prefix: String, after position: String?, limit: Int) -> MetadataPage {
    access { state in
      let from = position.map { $0.utf8.lexicographicallyPrecedes(prefix.utf8) } ?? true
      var index = Self.place(of: MetadataKey(from ? prefix : position!), state)
      if let position, index < state.keys.count, state.keys[index] == MetadataKey(position) {
        index += 1
      }
      var keys: [MetadataKey] = []
      while keys.count <= limit, index < state.keys.count,
        state.keys[index].text.utf8.starts(with: prefix.utf8)
      {
        keys.append(state.keys[index])
        index += 1
      }
      let entries = keys.prefix(limit).map {
        MetadataEntry(key: $0.text, value: state.table[$0]!.value)
      }
      return MetadataPage(
        entries: entries, revision: state.revision,
        next: keys.count > limit ? entries.last?.key : nil)
    }
  }

  /// Changes after a state; `repeated` also includes those of some states before it.
  func changes(_ prefix: String, since revision: UInt64, repeated: UInt64) -> MetadataChanges {
    access { state in
      if revision < state.forgotten || revision > state.revision { return .unknown }
      let first = revision - min(revision, repeated)
      let found = state.log.filter {
        $0.revision > first && $0.revision > state.forgotten
          && $0.change.key.utf8.starts(with: prefix.utf8)
      }
      return .changes(found.map(\.change), revision: state.revision)
    }
  }

  func grant(_ ttlMilliseconds: UInt64) -> MetadataLease {
    let now = now()
    return access { state in
      state.lastLease += 1
      state.leases[state.lastLease] = Lease(
        ttl: ttlMilliseconds, end: now + ttlMilliseconds * 1_000_000)
      return MetadataLease(id: state.lastLease, ttlMilliseconds: ttlMilliseconds)
    }
  }

  /// Also returns what else depends on the lease.
  func renew(
    _ lease: MetadataLease, _ entries: [MetadataEntry]
  ) -> (MetadataRenewal, strays: [String]) {
    let now = now()
    return access { state in
      guard let present = state.leases[lease.id] else { return (.gone, []) }
      state.renewals.append(now)
      state.leases[lease.id]?.end = now + present.ttl * 1_000_000
      let lost = entries.map(\.key).filter {
        state.table[MetadataKey($0)]?.lease != lease.id
      }
      let renewal = lost.isEmpty ? MetadataRenewal.kept : .lost(lost)
      let count = state.table.values.count { $0.lease == lease.id }
      if count == entries.count - lost.count { return (renewal, []) }
      let known = Set(entries.map { MetadataKey($0.key) })
      let strays = state.table.filter { $0.value.lease == lease.id && !known.contains($0.key) }
      return (renewal, strays.keys.map(\.text))
    }
  }

  func revoke(_ lease: MetadataLease) { access { Self.end(lease.id, &$0) } }
}

/// One process's access to a scripted service.
final class ScriptedStore: MetadataService {
  let uri = try! MetadataURI(parsing: "http://scripted.test/metadata")
  let listingScansAllKeys = false
  let comparesRevisions = false
  private let service: ScriptedService
  private let before: @Sendable () -> ScriptedService.Fate
  private let pageLimit: @Sendable () -> Int
  private let repeated: @Sendable () -> UInt64
  private static let transactionCount = 128

  init(
    _ service: ScriptedService, pageLimit: @escaping @Sendable () -> Int = { 500 },
    repeated: @escaping @Sendable () -> UInt64 = { 0 },
    before: @escaping @Sendable () -> ScriptedService.Fate
  ) {
    self.service = service
    self.pageLimit = pageLimit
    self.repeated = repeated
    self.before = before
  }

  private func call<Result>(_ body: () -> Result) throws(MooncakeError) -> Result {
    switch before() {
    case .done: return body()
    case .unreachable: throw failure("cut off")
    case .answerLost:
      _ = body()
      throw failure("no answer")
    }
  }

  private func check(_ verdict: ScriptedService.Verdict) throws(MooncakeError) {
    switch verdict {
    case .done, .exists: return
    case .noLease: throw MooncakeError(.notFound, "the lease has ended")
    case .refused: throw MooncakeError(.protocolViolation, "the key is refused")
    }
  }

  private func failure(_ cause: String) -> MooncakeError { MooncakeError(.unreachable, cause) }

  func get(_ key: String, _ call: Call) throws(MooncakeError) -> String? {
    try self.call { service.get(key) }
  }

  func values(of keys: [String], _ call: Call) throws(MooncakeError) -> [String?] {
    var values: [String?] = []
    while values.count < keys.count {
      let part = keys[values.count...].prefix(Self.transactionCount)
      values += try self.call { service.values(part) }
    }
    return values
  }

  func put(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) {
    let verdict = try self.call { service.put(entry, lease, isOnlyIfAbsent: false) }
    try check(verdict)
  }

  func putIfAbsent(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) -> Bool {
    let verdict = try self.call { service.put(entry, lease, isOnlyIfAbsent: true) }
    try check(verdict)
    return verdict == .done
  }

  func delete(_ key: String, _ call: Call) throws(MooncakeError) -> Bool {
    try self.call { service.delete(key) }
  }

  func list(
    prefix: String, from position: String?, limit: Int, _ call: Call
  ) throws(MooncakeError) -> MetadataPage {
    let limit = min(limit, pageLimit())
    return try self.call { service.list(prefix, after: position, limit: limit) }
  }

  func changes(
    prefix: String, since revision: UInt64, _ call: Call
  ) throws(MooncakeError) -> MetadataChanges {
    let repeated = repeated()
    return try self.call { service.changes(prefix, since: revision, repeated: repeated) }
  }

  func grant(ttlMilliseconds: UInt64, _ call: Call) throws(MooncakeError) -> MetadataLease? {
    try self.call { service.grant(ttlMilliseconds) }
  }

  func renew(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], strays: inout [String],
    _ call: Call
  ) throws(MooncakeError) -> MetadataRenewal {
    guard let lease else { return .kept }
    let (renewal, others) = try self.call { service.renew(lease, entries) }
    strays += others
    return renewal
  }

  func revoke(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], _ call: Call
  ) throws(MooncakeError) {
    if let lease { return try self.call { service.revoke(lease) } }
    for entry in entries { _ = try self.call { service.delete(entry.key, ifIs: entry.value) } }
  }
}
