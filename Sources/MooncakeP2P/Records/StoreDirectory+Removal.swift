import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

/// The recent removals of one name.
package struct Removals: Sendable {
  /// Everything published up to this time is removed; nil: nothing is.
  package private(set) var untilMilliseconds: UInt64?

  /// Whether what a summary describes was removed. If the same version was published again since,
  /// its time is later.
  package func cover(_ summary: PayloadSummary) -> Bool {
    untilMilliseconds.map { summary.publishedMilliseconds <= $0 } ?? false
  }

  mutating func note(_ tombstone: Tombstone) {
    untilMilliseconds = max(untilMilliseconds ?? 0, tombstone.untilMilliseconds)
  }
}

/// Records that a version of a name was removed, and everything published before it.
struct Tombstone: Sendable {
  let name: String
  let version: PayloadVersion
  let untilMilliseconds: UInt64

  init(_ name: String, _ version: PayloadVersion, untilMilliseconds: UInt64) {
    self.name = name
    self.version = version
    self.untilMilliseconds = untilMilliseconds
  }

  init(json: String) throws(MooncakeError) {
    (name, version, untilMilliseconds) = try PayloadSummary.read(json) {
      value throws(MooncakeError) in
      guard let name = value["name"]?.string,
        let version = value["removed"]?.string.flatMap({ PayloadVersion($0) }),
        let until = value["until_ms"]?.unsigned
      else { throw MooncakeError(.protocolViolation, "malformed removal of a payload") }
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

/// The lease of the removals that one process makes in some period.
struct Burial: Sendable {
  let lease: MetadataLease?
  /// On the directory's clock.
  let start: UInt64
}

extension StoreDirectory {
  /// How long a removal is remembered at least. A holder out of touch for longer finds out by the
  /// mark whether it may have missed one.
  package static let removalMilliseconds: UInt64 = 30 * 60_000
  /// The longest lease that our server grants. Half of it is for later removals.
  private static let burialMilliseconds: UInt64 = 2 * removalMilliseconds
  private static let attemptLimit = 8

  private var removalPrefix: String { prefix + "store/removed/" }

  private func removalPrefix(_ name: String) -> String {
    removalPrefix + PercentEncoding.encode(name) + "/"
  }

  package func tombstoneKey(_ name: String, _ version: PayloadVersion) -> String {
    removalPrefix(name) + version.description
  }

  /// Its text changes with each removal of any name; absent if there never was one. It cannot clash
  /// with a name, because no name is empty.
  var removalMarkKey: String { removalPrefix + "/latest" }

  /// Removes a name: its holders withdraw every version published until now. Returns false if there
  /// is none. Holders with a later version of the store may not understand this removal: then it
  /// throws `unsupported` and removes nothing.
  package func remove(_ name: String, _ call: Call) throws(MooncakeError) -> Bool {
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
      // Only what is read after the removal was put ends the loop: until then, a holder that looks
      // for removals finds none and may put a head. A head published later belongs to somebody
      // else.
      if isRemoved && (text == nil || head.map { !removals.cover($0.summary) } ?? false) { break }
      var summaries = try versions(of: name, call).map(\.summary)
      if let head, !summaries.contains(where: { $0.version == head.version }) {
        summaries.append(head.summary)
      }
      // Nobody stands for it; its holders, if any, have yet to learn of its removal.
      if text == nil && summaries.allSatisfy({ removals.cover($0) }) {
        if removals.untilMilliseconds == nil { try refuseLaterRecords(of: name, call) }
        break
      }
      // This comes first, because a holder that finds no head looks here before it puts one.
      try bury(name, summaries, since: start, call)
      isRemoved = true
      if let text { try delete(MetadataEntry(key: headKey(name), value: text), call) }
    }
    return isRemoved
  }

  private func bury(
    _ name: String, _ summaries: [PayloadSummary], since start: UInt64, _ call: Call
  ) throws(MooncakeError) {
    let until = max(start, summaries.map(\.publishedMilliseconds).max() ?? 0)
    // Before, so that holders that are away notice it even if this breaks off; after, because
    // others may have looked in between.
    try putMark(call)
    // If the head is unreadable, it may stand for any version.
    let versions =
      summaries.isEmpty ? [PayloadVersion(high: 0, low: 0)] : summaries.map(\.version)
    for version in versions {
      let entry = MetadataEntry(
        key: tombstoneKey(name, version),
        value: Tombstone(name, version, untilMilliseconds: until).json)
      do throws(MooncakeError) {
        try store.put(entry, lease: try burialLease(call), call)
      } catch {
        if error.code != .notFound { throw error }
        burial.withLock { $0 = nil }
        try store.put(entry, lease: try burialLease(call), call)
      }
    }
    try putMark(call)
  }

  private func putMark(_ call: Call) throws(MooncakeError) {
    try store.put(
      MetadataEntry(
        key: removalMarkKey,
        value: HexNumber.text(.random(in: 0 ... .max)) + HexNumber.text(.random(in: 0 ... .max))),
      lease: nil, call)
  }

  /// A lease that lasts long enough, reused for all removals of some period because services limit
  /// how many there are.
  private func burialLease(_ call: Call) throws(MooncakeError) -> MetadataLease? {
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

  /// The removals of one name.
  package func removals(
    of name: String, _ call: Call
  ) throws(MooncakeError) -> Removals {
    var removals = Removals()
    if try isListingSpared(call) { return removals }
    try store.forEach(prefix: removalPrefix(name), call) { entry throws(MooncakeError) in
      if let tombstone = tombstone(entry) { removals.note(tombstone) }
    }
    return removals
  }

  /// The same for every name that begins with `start` and for which `isAsked` is true.
  func removals(
    startingWith start: String, _ call: Call, isAsked: (MetadataKey) -> Bool
  ) throws(MooncakeError) -> [MetadataKey: Removals] {
    var removals: [MetadataKey: Removals] = [:]
    if try isListingSpared(call) { return removals }
    let prefix = removalPrefix + PercentEncoding.encode(start)
    try store.forEach(prefix: prefix, call) { entry throws(MooncakeError) in
      guard let tombstone = tombstone(entry) else { return }
      let name = MetadataKey(tombstone.name)
      if isAsked(name) { removals[name, default: Removals()].note(tombstone) }
    }
    return removals
  }

  /// Whether a listing can be skipped, for which some services walk through all of their keys. The
  /// mark is put before any removal and stays: without it, there are no removals.
  private func isListingSpared(_ call: Call) throws(MooncakeError) -> Bool {
    guard store.listingScansAllKeys else { return false }
    return try store.values(of: [removalMarkKey], call)[0] == nil
  }

  /// Whether any name was removed recently.
  func hasRemovals(_ call: Call) throws(MooncakeError) -> Bool {
    try store.list(prefix: removalPrefix, from: nil, limit: 2, call).entries.contains {
      $0.key != removalMarkKey
    }
  }

  /// nil unless the key is a removal's. The key alone says which version was removed, whatever text
  /// a later version of the store writes there.
  private func tombstone(_ entry: MetadataEntry) -> Tombstone? {
    guard let (name, version) = removed(inKey: entry.key) else { return nil }
    do throws(MooncakeError) {
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
