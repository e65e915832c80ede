import MooncakeBase
import MooncakeSystem

/// Follows the keys under a prefix: first all that are there, then each change. Survives a service
/// that forgets or restarts: then it lists anew and tells the difference.
package final class MetadataWatch {
  private let store: any MetadataStore
  private let prefix: String
  private var known: [MetadataKey: Int] = [:]
  private var revision: UInt64?

  package init(_ store: any MetadataStore, prefix: String) {
    self.store = store
    self.prefix = prefix
  }

  /// As below, everything within one call.
  package func next(_ call: MetadataCall) throws(EngineError) -> [MetadataChange] {
    try next(call, listing: call)
  }

  /// Waits for changes; none if the deadline passed first. May be called again after an error.
  /// Listing everything, at first and whenever changes are not known, may take longer than a wait:
  /// `listing` bounds it.
  package func next(
    _ call: MetadataCall, listing: MetadataCall
  ) throws(EngineError) -> [MetadataChange] {
    while true {
      guard let revision else {
        let changes = try listAnew(listing)
        if !changes.isEmpty || call.deadline.hasPassed { return changes }
        continue
      }
      let outcome: MetadataChanges
      do throws(EngineError) {
        outcome = try store.changes(prefix: prefix, since: revision, call)
      } catch {
        // The service may come back empty, and count from the beginning again.
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

  private func listAnew(_ call: MetadataCall) throws(EngineError) -> [MetadataChange] {
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
