import MooncakeEngine
import MooncakeSystem

/// The store's part of a metadata service: its keys, and what stands under them.
///
/// A record that is malformed counts as absent where many are read, and is an error where one is
/// asked for.
package final class StoreDirectory: Sendable {
  package let store: any MetadataStore
  /// Of every key: "mooncake/", and the cluster if there is one.
  let prefix: String
  /// How long records stay without a sign of life of their process.
  let ttlMilliseconds: UInt64

  /// How long a removed name is remembered, so that every holder learns of it.
  static let tombstoneMilliseconds: UInt64 = 60_000

  package convenience init(_ directory: MetadataDirectory) {
    self.init(
      directory.store, prefix: directory.prefix,
      ttlMilliseconds: directory.settings.ttlMilliseconds)
  }

  package init(_ store: any MetadataStore, prefix: String, ttlMilliseconds: UInt64) {
    self.store = store
    self.prefix = prefix
    self.ttlMilliseconds = ttlMilliseconds
  }

  package var uri: MetadataURI { store.uri }

  // MARK: Keys

  var headPrefix: String { prefix + "store/object/" }

  package func headKey(_ name: String) -> String { headPrefix + name }

  package func tombstoneKey(_ name: String) -> String { prefix + "store/removed/" + name }

  /// Names are encoded, a slash too, so that none is the beginning of another's keys.
  func holderPrefix(_ name: String) -> String {
    prefix + "store/holder/\(PercentEncoding.encode(name))/"
  }

  /// Holdings are random numbers, which makes a range of keys a fair sample.
  package func holderKey(_ record: HolderRecord) -> String {
    holderPrefix(record.name) + "\(record.version)/\(HexNumber.text(record.holder.holding))"
  }

  // MARK: One payload

  /// What stands under a name; nil if nothing does.
  package func head(_ name: String, _ call: MetadataCall) throws(EngineError) -> PayloadHead? {
    guard let text = try store.get(headKey(name), call) else { return nil }
    do throws(EngineError) {
      let head = try PayloadHead(json: text)
      if !head.name.utf8.elementsEqual(name.utf8) { throw PayloadSummary.malformed("name") }
      return head
    } catch {
      let place = "metadata \(uri): key '\(headKey(name))': \(error.message)"
      if error.code == .unsupported { throw EngineError(.unsupported, place) }
      throw EngineError(
        error.code,
        "\(place): register the payload anew; else remove the key with `mooncake metadata delete`")
    }
  }

  /// Some holders of a version, chosen at random when there are more than `limit`. What is read is
  /// bounded by the limit, however many there are.
  package func holders(
    of name: String, _ version: PayloadVersion, limit: Int, _ call: MetadataCall
  ) throws(EngineError) -> [HolderRecord] {
    let prefix = holderPrefix(name) + "\(version)/"
    let start = prefix + HexNumber.text(.random(in: 0 ... .max))
    let page = try store.list(prefix: prefix, from: start, limit: limit, call)
    var entries = page.entries
    if page.next == nil && entries.count < limit {
      // Around the end, up to where it began.
      entries += try store.list(
        prefix: prefix, from: nil, limit: limit - entries.count, call
      ).entries.prefix { !start.utf8.lexicographicallyPrecedes($0.key.utf8) }
    }
    return entries.compactMap(record)
  }

  /// Holders of all versions of a name, in no useful order.
  package func allHolders(
    of name: String, limit: Int = .max, _ call: MetadataCall
  ) throws(EngineError) -> [HolderRecord] {
    if limit == .max {
      return try store.listAll(prefix: holderPrefix(name), call).entries.compactMap(record)
    }
    return try store.list(
      prefix: holderPrefix(name), from: nil, limit: limit, call
    ).entries.compactMap(record)
  }

  func hasHolders(_ name: String, _ call: MetadataCall) throws(EngineError) -> Bool {
    try !store.list(prefix: holderPrefix(name), from: nil, limit: 1, call).entries.isEmpty
  }

  /// The record of an entry; nil unless it is one and stands where it belongs.
  func record(_ entry: MetadataEntry) -> HolderRecord? {
    guard let record = try? HolderRecord(json: entry.value),
      holderKey(record).utf8.elementsEqual(entry.key.utf8)
    else { return nil }
    return record
  }

  // MARK: Removal

  /// Removes a name: its holders withdraw the version that it has now. Returns false if there is
  /// none.
  package func remove(_ name: String, _ call: MetadataCall) throws(EngineError) -> Bool {
    let text = try store.get(headKey(name), call)
    let head = text.flatMap { try? PayloadHead(json: $0) }
    var newest: HolderRecord?
    if head == nil {
      // Those that have not learned of a removal yet are no reason for another.
      let removed = try removedVersion(name, call)
      newest = Self.newest(
        try allHolders(of: name, limit: 256, call).filter { $0.version != removed })
    }
    if let version = head?.version ?? newest?.version {
      // First this, since a holder that finds no head looks here before it puts one.
      let lease = try store.grant(ttlMilliseconds: Self.tombstoneMilliseconds, call)
      try store.put(
        MetadataEntry(key: tombstoneKey(name), value: Self.tombstone(name, version)),
        lease: lease, call)
    }
    guard let text else { return newest != nil }
    try delete(MetadataEntry(key: headKey(name), value: text), call)
    return true
  }

  /// The version of a name that was removed lately; nil if none was.
  func removedVersion(
    _ name: String, _ call: MetadataCall
  ) throws(EngineError) -> PayloadVersion? {
    try store.get(tombstoneKey(name), call).flatMap(Self.removedVersion)
  }

  /// The same of every name that begins with `start`.
  func removedVersions(
    prefix start: String, _ call: MetadataCall
  ) throws(EngineError) -> [MetadataKey: PayloadVersion] {
    var versions: [MetadataKey: PayloadVersion] = [:]
    for entry in try store.listAll(prefix: tombstoneKey(start), call).entries {
      let name = String(entry.key.dropFirst(tombstoneKey("").count))
      versions[MetadataKey(name)] = Self.removedVersion(entry.value)
    }
    return versions
  }

  private static func removedVersion(_ tombstone: String) -> PayloadVersion? {
    try? PayloadSummary.read(tombstone) { value throws(EngineError) in
      value["removed"]?.string.flatMap { PayloadVersion($0) }
    }
  }

  private static func tombstone(_ name: String, _ version: PayloadVersion) -> String {
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("name", name)
    writer.member("removed", version.description)
    writer.endObject()
    return writer.text
  }

  static func newest(_ records: [HolderRecord]) -> HolderRecord? {
    records.max { $0.publishedMilliseconds < $1.publishedMilliseconds }
  }

  /// Deletes a key that others may put too, if it holds this value.
  func delete(_ entry: MetadataEntry, _ call: MetadataCall) throws(EngineError) {
    guard let etcd = store as? EtcdStore else { return try store.revoke(nil, [entry], call) }
    guard let (value, revision) = try etcd.getRevised(entry.key, call),
      value.utf8.elementsEqual(entry.value.utf8)
    else { return }
    _ = try etcd.replace(entry.key, writtenBy: revision, with: nil, call)
  }
}
