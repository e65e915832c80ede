import MooncakeBase
import MooncakeEngine
import MooncakeMetadata

/// What the holders' records say about one version of a payload.
package struct HeldVersion: Sendable {
  package private(set) var summary: PayloadSummary
  package private(set) var holderCount: UInt64 = 0
  /// Whether one of its holders knows of no newer version.
  package private(set) var isCurrent = false
  /// Whether such a holder has all of it.
  package private(set) var isComplete = false

  init(_ record: HolderRecord) {
    summary = record.summary
    note(record)
  }

  package var version: PayloadVersion { summary.version }

  mutating func note(_ record: HolderRecord) {
    holderCount += 1
    let isNewer = record.publishedMilliseconds > summary.publishedMilliseconds
    if record.isSuperseded {
      if isNewer && !isCurrent { summary = record.summary }
      return
    }
    if isNewer || !isCurrent { summary = record.summary }
    isCurrent = true
    isComplete = isComplete || record.isComplete
  }
}

extension PayloadSummary {
  /// Whether another version of the name was published later.
  func isOlder(than other: PayloadSummary) -> Bool {
    if publishedMilliseconds != other.publishedMilliseconds {
      return publishedMilliseconds < other.publishedMilliseconds
    }
    return (version.high, version.low) < (other.version.high, other.version.low)
  }
}

extension StoreDirectory {
  private static let recordCount = 256

  /// The versions of a name that somebody holds. Only one page of records is in memory at a time,
  /// and no more are read for a version once a complete holder is found.
  package func versions(
    of name: String, _ call: Call
  ) throws(MooncakeError) -> [HeldVersion] {
    let prefix = holderPrefix(name)
    var versions: [HeldVersion] = []
    var position: String?
    repeat {
      let page = try store.list(
        prefix: prefix, from: position, limit: Self.recordCount, call)
      for entry in page.entries {
        if let record = record(entry) { Self.note(record, &versions) }
      }
      position = page.next
      if let last = versions.last, last.isComplete, let next = position {
        let own = holderPrefix(name, last.version)
        // Sorts after all digits.
        if next.utf8.starts(with: own.utf8) { position = own + "~" }
      }
    } while position != nil
    return versions
  }

  /// Records come in key order, so those of one version are together.
  static func note(_ record: HolderRecord, _ versions: inout [HeldVersion]) {
    if versions.last?.version == record.version {
      versions[versions.count - 1].note(record)
    } else {
      versions.append(HeldVersion(record))
    }
  }

  /// The version of a name without a head; nil if there is none. A version whose holders know of a
  /// newer one is not revived when that one is gone, nor is a removed one.
  package func newest(
    of name: String, _ call: Call
  ) throws(MooncakeError) -> HeldVersion? {
    let versions = try versions(of: name, call)
    if !versions.contains(where: \.isCurrent) { return nil }
    return Self.newest(versions, try removals(of: name, call))
  }

  static func newest(_ versions: [HeldVersion], _ removals: Removals) -> HeldVersion? {
    versions.filter { $0.isCurrent && !removals.cover($0.summary) }
      .max { $0.summary.isOlder(than: $1.summary) }
  }

  /// How a name without a head is listed: as its newest version, if somebody has all of it and so
  /// is about to put a head.
  static func listed(_ versions: [HeldVersion], _ removals: Removals) -> HeldVersion? {
    newest(versions, removals).flatMap { $0.isComplete ? $0 : nil }
  }
}
