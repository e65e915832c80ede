import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

/// Reports changes to payloads whose names have a prefix. But for moments, what it has reported
/// matches a list. Used by one thread at a time.
///
/// It follows the heads, which are what a name leads to. If one is gone, it looks for holders of
/// the payload until one of them puts a new head or none is left.
package final class PayloadFollower: @unchecked Sendable {
  // Unchecked: it belongs to the thread of its watch.
  package let prefix: String
  private let directory: StoreDirectory
  private let tell: @Sendable (PayloadChange) -> Void
  private let watch: MetadataWatch

  /// What has been reported, by name.
  private var known: [MetadataKey: PayloadSummary] = [:]
  /// Payloads whose heads are gone, so that the holders' records count.
  private var headless: [MetadataKey: Headless] = [:]
  private struct Headless {
    /// The head cannot be read, so no holder may replace it.
    var isBlocked: Bool
    /// When it is looked at next, on the directory's clock, and the time between the last two
    /// looks.
    var due: UInt64 = 0
    var pause: UInt64 = 0
  }
  /// Until when to be patient: a service that comes back may have lost what holders are about to
  /// put again.
  private var patience: UInt64 = 0

  private static let recheckMilliseconds: UInt64 = 1000
  /// For blocked names, while nothing happens to them.
  private static let maximumRecheckMilliseconds: UInt64 = 10_000
  /// Time limit of a look at payloads without a head; changes to others wait for it.
  private static let lookMilliseconds: UInt64 = 5000

  package init(
    _ directory: StoreDirectory, prefix: String, tell: @escaping @Sendable (PayloadChange) -> Void
  ) {
    self.directory = directory
    self.prefix = prefix
    self.tell = tell
    watch = MetadataWatch(directory.store, prefix: directory.headKey(prefix))
  }

  package var uri: MetadataURI { directory.uri }

  /// Waits for changes and reports them; returns when there were some, when payloads without a head
  /// must be looked at, or at the call's deadline. May be called again after an error.
  package func turn(_ call: Call) throws(MooncakeError) {
    do throws(MooncakeError) {
      for change in try watch.next(call.within(nextLook), listing: call) { take(change) }
      try lookAtHeadless(
        Call(
          until: .after(milliseconds: Self.lookMilliseconds), cancellation: call.cancellation))
    } catch {
      if error.code != .canceled {
        patience = directory.now() &+ directory.ttlMilliseconds * 1_000_000
      }
      throw error
    }
  }

  private var nextLook: Deadline {
    if headless.isEmpty { return .never }
    let now = directory.now()
    var pause = Self.maximumRecheckMilliseconds
    for state in headless.values {
      let left = (state.due - min(state.due, now) + 999_999) / 1_000_000
      pause = min(pause, state.isBlocked ? left : Self.recheckMilliseconds)
    }
    return .after(milliseconds: pause)
  }

  private func take(_ change: MetadataChange) {
    let name = directory.name(ofHead: change.key)
    let key = MetadataKey(name)
    let head: PayloadHead? =
      switch change {
      case .put(let entry): directory.head(name, in: entry.value)
      case .delete: nil
      }
    // What cannot be read counts as absent.
    guard let head else {
      if case .put = change {
        headless[key] = Headless(isBlocked: true)
      } else {
        headless[key] = known[key] == nil ? nil : Headless(isBlocked: false)
      }
      return
    }
    headless[key] = nil
    note(head.summary, key)
  }

  private func note(_ summary: PayloadSummary, _ key: MetadataKey) {
    let former = known.updateValue(summary, forKey: key)
    // Another holder standing for the same version is not a change.
    if former?.version == summary.version { return }
    let info = summary.info(holderCount: 1)
    tell(former == nil ? .appeared(info) : .changed(info))
  }

  private func lookAtHeadless(_ call: Call) throws(MooncakeError) {
    let now = directory.now()
    let keys = headless.filter { $0.value.due <= now }.map(\.key).sorted()
    if keys.isEmpty { return }
    let (listed, removals) = try directory.lookUp(keys, startingWith: prefix, call)
    for key in keys {
      let told = known[key]
      if let summary = listed[key] {
        note(summary, key)
      } else if let told, patience <= now || removals[key]?.cover(told) ?? false {
        // No holder may put a head for a blocked name, so keep looking at it.
        if headless[key]?.isBlocked == false { headless[key] = nil }
        known[key] = nil
        tell(.vanished(name: told.name))
      }
      if headless[key]?.isBlocked == true {
        postpone(key, now, isQuiet: known[key]?.version == told?.version)
      }
    }
  }

  /// Looks at a blocked name less and less often.
  private func postpone(_ key: MetadataKey, _ now: UInt64, isQuiet: Bool) {
    guard let pause = headless[key]?.pause else { return }
    let next =
      isQuiet
      ? min(Self.maximumRecheckMilliseconds, max(Self.recheckMilliseconds, pause * 2))
      : Self.recheckMilliseconds
    headless[key]?.pause = next
    headless[key]?.due = now &+ next * 1_000_000
  }
}
