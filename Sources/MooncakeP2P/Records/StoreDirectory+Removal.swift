import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

/// What was removed of one name lately.
package struct Removals: Sendable {
  /// Up to when what was published is removed; nil if nothing was.
  package private(set) var untilMilliseconds: UInt64?

  /// Whether what a summary tells was removed. The same version may have been published since: that
  /// is told as later.
  package func cover(_ summary: PayloadSummary) -> Bool {
    untilMilliseconds.map { summary.publishedMilliseconds <= $0 } ?? false
  }

  mutating func note(_ tombstone: Tombstone) {
    untilMilliseconds = max(untilMilliseconds ?? 0, tombstone.untilMilliseconds)
  }
}

/// Says that a version of a name was removed, and all that was published before.
struct Tombstone: Sendable {
  let name: String
  let version: PayloadVersion
  let untilMilliseconds: UInt64

  init(_ name: String, _ version: PayloadVersion, untilMilliseconds: UInt64) {
    self.name = name
    self.version = version
    self.untilMilliseconds = untilMilliseconds
  }

  init(json: String) throws(EngineError) {
    (name, version, untilMilliseconds) = try PayloadSummary.read(json) {
      value throws(EngineError) in
      guard let name = value["name"]?.string,
        let version = value["removed"]?.string.flatMap({ PayloadVersion($0) }),
        let until = value["until_ms"]?.unsigned
      else { throw EngineError(.protocolViolation, "malformed removal of a payload") }
      return (name, version, until)
    }
  }

  var json: String {
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("name", name)
    writer.member("removed", version.description)
    writer.member("until_ms", untilMilliseconds)
    writer.endObject()
    return writer.text
  }
}

/// The lease of the removals that one process makes in some time.
struct Burial: Sendable {
  let lease: MetadataLease?
  /// On the directory's clock.
  let start: UInt64
}

extension StoreDirectory {
  /// How long a removal is remembered at least. A holder that has been out of touch for longer
  /// finds out by the mark whether it may have missed one.
  package static let removalMilliseconds: UInt64 = 30 * 60_000
  /// As long as our server's leases may be. Half of it is for removals to come.
  private static let burialMilliseconds: UInt64 = 2 * removalMilliseconds
  private static let attemptLimit = 8

  private var removalPrefix: String { prefix + "store/removed/" }

  private func removalPrefix(_ name: String) -> String {
    removalPrefix + PercentEncoding.encode(name) + "/"
  }

  package func tombstoneKey(_ name: String, _ version: PayloadVersion) -> String {
    removalPrefix(name) + version.description
  }

  /// Another text with each removal of whatever name; nothing for as long as there was none. No
  /// name is empty.
  var removalMarkKey: String { removalPrefix + "/latest" }

  /// Removes a name: its holders withdraw each version that there is by now. Returns false if there
  /// is none. Those of a later version of the store may not withdraw for what this one writes: then
  /// it throws `unsupported`, and nothing is removed.
  package func remove(_ name: String, _ call: MetadataCall) throws(EngineError) -> Bool {
    let start = wallMilliseconds()
    var isRemoved = false
    for _ in 0..<Self.attemptLimit {
      let text = try store.get(headKey(name), call)
      if let refusal = refusal(ofHead: name, text) {
        if isRemoved { break }
        throw refusal
      }
      let head = head(name, in: text)
      let removals = try removals(of: name, call)
      // Only what is read after the removal was put ends this: until then a holder that looks for
      // one finds none and may stand for the name. A head published later is another's.
      if isRemoved && (text == nil || head.map { !removals.cover($0.summary) } ?? false) { break }
      var summaries = try versions(of: name, call).map(\.summary)
      if let head, !summaries.contains(where: { $0.version == head.version }) {
        summaries.append(head.summary)
      }
      // Nobody stands for it, and its holders are yet to learn of its removal, if there are any.
      if text == nil && summaries.allSatisfy({ removals.cover($0) }) {
        if removals.untilMilliseconds == nil { try refuseLaterRecords(of: name, call) }
        break
      }
      // First this, since a holder that finds no head looks here before it puts one.
      try bury(name, summaries, since: start, call)
      isRemoved = true
      if let text { try delete(MetadataEntry(key: headKey(name), value: text), call) }
    }
    return isRemoved
  }

  private func bury(
    _ name: String, _ summaries: [PayloadSummary], since start: UInt64, _ call: MetadataCall
  ) throws(EngineError) {
    let until = max(start, summaries.map(\.publishedMilliseconds).max() ?? 0)
    // Before, so that whoever is away finds it even if this ends in the middle; after, since others
    // may have looked in between.
    try putMark(call)
    // Behind a head that nobody can read there may be any version.
    let versions =
      summaries.isEmpty ? [PayloadVersion(high: 0, low: 0)] : summaries.map(\.version)
    for version in versions {
      let entry = MetadataEntry(
        key: tombstoneKey(name, version),
        value: Tombstone(name, version, untilMilliseconds: until).json)
      do throws(EngineError) {
        try store.put(entry, lease: try burialLease(call), call)
      } catch {
        if error.code != .notFound { throw error }
        burial.withLock { $0 = nil }
        try store.put(entry, lease: try burialLease(call), call)
      }
    }
    try putMark(call)
  }

  private func putMark(_ call: MetadataCall) throws(EngineError) {
    try store.put(
      MetadataEntry(
        key: removalMarkKey,
        value: HexNumber.text(.random(in: 0 ... .max)) + HexNumber.text(.random(in: 0 ... .max))),
      lease: nil, call)
  }

  /// A lease that lasts long enough; one for all removals of some time, since services bound how
  /// many there are.
  private func burialLease(_ call: MetadataCall) throws(EngineError) -> MetadataLease? {
    let now = now()
    let present = burial.withLock { $0 }
    if let present,
      now &- present.start < (Self.burialMilliseconds - Self.removalMilliseconds) * 1_000_000
    {
      return present.lease
    }
    let lease = try store.grant(ttlMilliseconds: Self.burialMilliseconds, call)
    burial.withLock { $0 = Burial(lease: lease, start: now) }
    return lease
  }

  /// What was removed of a name.
  package func removals(
    of name: String, _ call: MetadataCall
  ) throws(EngineError) -> Removals {
    var removals = Removals()
    if try isListingSpared(call) { return removals }
    try store.forEach(prefix: removalPrefix(name), call) { entry throws(EngineError) in
      if let tombstone = tombstone(entry) { removals.note(tombstone) }
    }
    return removals
  }

  /// The same of every name that begins with `start` and that `isAsked` for.
  func removals(
    startingWith start: String, _ call: MetadataCall, isAsked: (MetadataKey) -> Bool
  ) throws(EngineError) -> [MetadataKey: Removals] {
    var removals: [MetadataKey: Removals] = [:]
    if try isListingSpared(call) { return removals }
    let prefix = removalPrefix + PercentEncoding.encode(start)
    try store.forEach(prefix: prefix, call) { entry throws(EngineError) in
      guard let tombstone = tombstone(entry) else { return }
      let name = MetadataKey(tombstone.name)
      if isAsked(name) { removals[name, default: Removals()].note(tombstone) }
    }
    return removals
  }

  /// Redis walks over all of its keys for a listing. The mark is put before whatever else tells of
  /// a removal, and stays: without it there is none.
  private func isListingSpared(_ call: MetadataCall) throws(EngineError) -> Bool {
    guard store is RedisStore else { return false }
    return try store.values(of: [removalMarkKey], call)[0] == nil
  }

  /// Whether any name at all was removed lately.
  func hasRemovals(_ call: MetadataCall) throws(EngineError) -> Bool {
    try store.list(prefix: removalPrefix, from: nil, limit: 2, call).entries.contains {
      $0.key != removalMarkKey
    }
  }

  /// nil unless the key is one's. The key alone says which version was removed, whatever a later
  /// version of this store has written there.
  private func tombstone(_ entry: MetadataEntry) -> Tombstone? {
    guard let (name, version) = removed(inKey: entry.key) else { return nil }
    do throws(EngineError) {
      let tombstone = try Tombstone(json: entry.value)
      if tombstone.version == version && tombstone.name.utf8.elementsEqual(name.utf8) {
        return tombstone
      }
      tellUnreadable(entry.key, "it names another payload")
    } catch {
      tellUnreadable(entry.key, error.message)
    }
    return Tombstone(name, version, untilMilliseconds: 0)
  }

  private func removed(inKey key: String) -> (name: String, version: PayloadVersion)? {
    guard key.utf8.starts(with: removalPrefix.utf8),
      let slash = key.utf8.lastIndex(of: UInt8(ascii: "/")),
      let start = key.utf8.index(
        key.startIndex, offsetBy: removalPrefix.utf8.count, limitedBy: slash),
      let name = PercentEncoding.decode(key[start..<slash]),
      let version = PayloadVersion(String(key[key.utf8.index(after: slash)...])),
      tombstoneKey(name, version).utf8.elementsEqual(key.utf8)
    else { return nil }
    return (name, version)
  }
}
