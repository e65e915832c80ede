import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem

/// A real service as seen by a process whose puts are not answered and take effect only when the
/// test says so, as happens when the service, or one member of it, stalls.
final class LateStore: MetadataService {
  private enum Put: Sendable {
    case always(MetadataEntry, MetadataLease?)
    case ifAbsent(MetadataEntry, MetadataLease?)
  }
  private let store: any MetadataService
  private struct State {
    /// Applies to keys that contain this.
    var part: String?
    var held: [Put] = []
  }
  private let state = Lock(State())

  init(_ store: any MetadataService) { self.store = store }

  /// From now on, puts of keys that contain `part` are held back.
  func hold(_ part: String) { state.withLock { $0.part = part } }

  /// Puts take effect at once again, as do those that were held back. Returns how many those were.
  func deliver() -> Int {
    let held = state.withLock { state in
      defer { state = State() }
      return state.held
    }
    return held.count { put in
      switch put {
      case .always(let entry, let lease):
        (try? store.put(entry, lease: lease, testCall)) != nil
      case .ifAbsent(let entry, let lease):
        (try? store.putIfAbsent(entry, lease: lease, testCall)) == true
      }
    }
  }

  private func keepBack(_ key: String, _ put: Put) throws(EngineError) {
    let isHeld = state.withLock { state in
      guard let part = state.part, key.contains(part) else { return false }
      state.held.append(put)
      return true
    }
    if isHeld { throw EngineError(.timeout, "no answer") }
  }

  var uri: MetadataURI { store.uri }

  func get(_ key: String, _ call: Call) throws(EngineError) -> String? {
    try store.get(key, call)
  }

  func values(of keys: [String], _ call: Call) throws(EngineError) -> [String?] {
    try store.values(of: keys, call)
  }

  func put(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(EngineError) {
    try keepBack(entry.key, .always(entry, lease))
    try store.put(entry, lease: lease, call)
  }

  func putIfAbsent(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(EngineError) -> Bool {
    try keepBack(entry.key, .ifAbsent(entry, lease))
    return try store.putIfAbsent(entry, lease: lease, call)
  }

  func delete(_ key: String, _ call: Call) throws(EngineError) -> Bool {
    try store.delete(key, call)
  }

  func list(
    prefix: String, from position: String?, limit: Int, _ call: Call
  ) throws(EngineError) -> MetadataPage {
    try store.list(prefix: prefix, from: position, limit: limit, call)
  }

  func changes(
    prefix: String, since revision: UInt64, _ call: Call
  ) throws(EngineError) -> MetadataChanges {
    try store.changes(prefix: prefix, since: revision, call)
  }

  func grant(ttlMilliseconds: UInt64, _ call: Call) throws(EngineError) -> MetadataLease? {
    try store.grant(ttlMilliseconds: ttlMilliseconds, call)
  }

  func renew(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], strays: inout [String],
    _ call: Call
  ) throws(EngineError) -> MetadataRenewal {
    try store.renew(lease, entries, strays: &strays, call)
  }

  /// A directory would ask etcd directly, which this hides.
  func revoke(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], _ call: Call
  ) throws(EngineError) {
    if lease != nil { return try store.revoke(lease, entries, call) }
    let directory = StoreDirectory(store, prefix: "mooncake/", ttlMilliseconds: 2000)
    for entry in entries { try directory.delete(entry, call) }
  }
}
