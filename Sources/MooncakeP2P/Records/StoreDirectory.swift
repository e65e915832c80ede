import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

/// The store's part of a metadata service: its keys and their values.
///
/// A malformed record counts as absent when many are read, and is an error when one is asked for.
package final class StoreDirectory: Sendable {
  package let store: any MetadataService
  /// Begins every key: "mooncake/", and the cluster if there is one.
  let prefix: String
  /// How long records outlive the last sign of life of their process.
  let ttlMilliseconds: UInt64
  /// Nanoseconds on a clock that never goes back and does not stop while the machine is suspended.
  let now: @Sendable () -> UInt64
  /// Milliseconds since 1970.
  let wallMilliseconds: @Sendable () -> UInt64
  /// The lease of removals.
  let burial = Lock<Burial?>(nil)
  /// Keys whose values have been reported as unreadable, and why.
  let unreadable = Lock<[MetadataKey: String]>([:])

  package convenience init(_ directory: MetadataDirectory) {
    self.init(
      directory.store, prefix: directory.prefix,
      ttlMilliseconds: directory.settings.ttlMilliseconds)
  }

  package init(
    _ store: any MetadataService, prefix: String, ttlMilliseconds: UInt64,
    now: @escaping @Sendable () -> UInt64 = { Clock.sinceBoot() },
    wallMilliseconds: @escaping @Sendable () -> UInt64 = { WallClock.milliseconds() }
  ) {
    self.store = store
    self.prefix = prefix
    self.ttlMilliseconds = ttlMilliseconds
    self.now = now
    self.wallMilliseconds = wallMilliseconds
  }

  package var uri: MetadataURI { store.uri }

  // MARK: Keys

  var headPrefix: String { prefix + "store/object/" }

  package func headKey(_ name: String) -> String { headPrefix + name }

  /// The name that a head's key belongs to.
  func name(ofHead key: String) -> String {
    String(decoding: key.utf8.dropFirst(headPrefix.utf8.count), as: UTF8.self)
  }

  /// Keys of all names that begin with `start`. Names are encoded, slashes too, so no name's keys
  /// begin with another name.
  func holderKeys(startingWith start: String) -> String {
    prefix + "store/holder/" + PercentEncoding.encode(start)
  }

  func holderPrefix(_ name: String) -> String { holderKeys(startingWith: name) + "/" }

  func holderPrefix(_ name: String, _ version: PayloadVersion) -> String {
    holderPrefix(name) + "\(version)/"
  }

  /// Holdings are random numbers, so a range of keys is a fair sample.
  package func holderKey(_ record: HolderRecord) -> String {
    holderPrefix(record.name, record.version) + HexNumber.text(record.holder.holding)
  }

  // MARK: One payload

  /// The head of a name; nil if there is none.
  package func head(_ name: String, _ call: Call) throws(MooncakeError) -> PayloadHead? {
    guard let text = try store.get(headKey(name), call) else { return nil }
    do throws(MooncakeError) {
      let head = try PayloadHead(json: text)
      if !head.name.utf8.elementsEqual(name.utf8) { throw PayloadSummary.malformed("name") }
      return head
    } catch {
      let refusal = refusal(headKey(name), error)
      if error.code == .unsupported { throw refusal }
      throw MooncakeError(
        error.code,
        "\(refusal.message): register the payload anew; else remove the key with `mooncake "
          + "metadata delete`")
    }
  }

  /// The same from a text already read; nil if it cannot be read, which is logged.
  func head(_ name: String, in text: String?) -> PayloadHead? {
    guard let text else { return nil }
    return readable(headKey(name)) { () throws(MooncakeError) in
      let head = try PayloadHead(json: text)
      if head.name.utf8.elementsEqual(name.utf8) { return head }
      throw MooncakeError(.protocolViolation, "it names another payload")
    }
  }

  /// Some holders of a version, chosen at random if there are more than `limit`. However many there
  /// are, no more than the limit are read.
  package func holders(
    of name: String, _ version: PayloadVersion, limit: Int, _ call: Call
  ) throws(MooncakeError) -> [HolderRecord] {
    let prefix = holderPrefix(name, version)
    let start = prefix + HexNumber.text(.random(in: 0 ... .max))
    let page = try store.list(prefix: prefix, from: start, limit: limit, call)
    var entries = page.entries
    if page.next == nil && entries.count < limit {
      // Wraps around, up to where it began.
      entries += try store.list(
        prefix: prefix, from: nil, limit: limit - entries.count, call
      ).entries.prefix { !start.utf8.lexicographicallyPrecedes($0.key.utf8) }
    }
    return entries.compactMap(record)
  }

  /// Holders of all versions of a name, in no useful order.
  package func allHolders(
    of name: String, limit: Int = .max, _ call: Call
  ) throws(MooncakeError) -> [HolderRecord] {
    if limit == .max {
      return try store.listAll(prefix: holderPrefix(name), call).entries.compactMap(record)
    }
    return try store.list(
      prefix: holderPrefix(name), from: nil, limit: limit, call
    ).entries.compactMap(record)
  }

  /// The record of an entry; nil if it is malformed or under the wrong key, which is logged.
  func record(_ entry: MetadataEntry) -> HolderRecord? {
    readable(entry.key) { () throws(MooncakeError) in
      let record = try HolderRecord(json: entry.value)
      if holderKey(record).utf8.elementsEqual(entry.key.utf8) { return record }
      throw MooncakeError(.protocolViolation, "it names another payload or holder")
    }
  }

  /// Deletes a key that others may also write, if it has this value.
  package func delete(_ entry: MetadataEntry, _ call: Call) throws(MooncakeError) {
    guard store.comparesRevisions else { return try store.revoke(nil, [entry], call) }
    guard let found = try store.getRevised(entry.key, isText: false, call),
      found.value.utf8.elementsEqual(entry.value.utf8)
    else { return }
    _ = try store.replace(entry.key, writtenBy: found.revision, with: nil, call)
  }
}
