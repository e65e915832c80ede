import MooncakeBase
import MooncakeSystem

/// Follows the keys under a prefix: first reports all existing ones, then each change. If the
/// service restarts or no longer has the changes, lists again and reports the difference.
package final class MetadataWatch {
  private let store: any MetadataService
  private let prefix: String
  private var known: [MetadataKey: Int] = [:]
  private var revision: UInt64?

  package init(_ store: any MetadataService, prefix: String) {
    self.store = store
    self.prefix = prefix
  }

  /// As below, with one call for listing and waiting.
  package func next(_ call: Call) throws(MooncakeError) -> [MetadataChange] {
    try next(call, listing: call)
  }

  /// Waits for changes; returns none if the deadline passed first. May be called again after an
  /// error. Listing everything, at first and whenever changes are unknown, may take longer than a
  /// wait and is bounded by `listing`.
  package func next(
    _ call: Call, listing: Call
  ) throws(MooncakeError) -> [MetadataChange] {
    while true {
      guard let revision else {
        let changes = try listAnew(listing)
        if !changes.isEmpty || call.deadline.hasPassed { return changes }
        continue
      }
      let outcome: MetadataChanges
      do throws(MooncakeError) {
        outcome = try store.changes(prefix: prefix, since: revision, call)
      } catch {
        // The service may come back empty and count from the beginning again.
        self.revision = nil
        throw error
      }
      switch outcome {
      case .unknown: self.revision = nil
      case .changes(let changes, let latest):
        self.revision = latest
        for change in changes { note(change) }
        if !changes.isEmpty || call.deadline.hasPassed { return changes }
      }
    }
  }

  private func listAnew(_ call: Call) throws(MooncakeError) -> [MetadataChange] {
    let (entries, revision) = try store.listAll(prefix: prefix, call)
    var gone = known
    var changes: [MetadataChange] = []
    for entry in entries {
      let former = gone.removeValue(forKey: MetadataKey(entry.key))
      if former != entry.value.hashValue { changes.append(.put(entry)) }
    }
    changes += gone.keys.sorted().map { .delete(key: $0.text) }
    for change in changes { note(change) }
    self.revision = revision
    return changes
  }

  private func note(_ change: MetadataChange) {
    switch change {
    case .put(let entry): known[MetadataKey(entry.key)] = entry.value.hashValue
    case .delete(let key): known[MetadataKey(key)] = nil
    }
  }
}
