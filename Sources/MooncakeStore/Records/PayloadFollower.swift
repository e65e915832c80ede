import MooncakeEngine
import MooncakeSystem

/// Tells what happens to payloads whose names have a prefix, so that what has been told is what a
/// list says, but for moments. Used by one thread at a time.
///
/// It follows the heads, by which a name is found. Where one is gone it looks who holds the
/// payload, until another stands for it or nobody does.
package final class PayloadFollower: @unchecked Sendable {
  // Unchecked: it belongs to the thread of its watch.
  package let prefix: String
  private let directory: StoreDirectory
  private let tell: @Sendable (PayloadChange) -> Void
  private let watch: MetadataWatch

  /// What has been told, by name.
  private var known: [MetadataKey: PayloadSummary] = [:]
  /// Those whose heads are gone: what the holders' records tell counts.
  private var headless: [MetadataKey: Headless] = [:]
  private enum Headless { case gone, malformed }
  /// A service that comes back may have lost what its holders are about to put again.
  private var patience: UInt64 = 0

  private static let recheckMilliseconds: UInt64 = 1000

  package init(
    _ directory: StoreDirectory, prefix: String, tell: @escaping @Sendable (PayloadChange) -> Void
  ) {
    self.directory = directory
    self.prefix = prefix
    self.tell = tell
    watch = MetadataWatch(directory.store, prefix: directory.headKey(prefix))
  }

  package var uri: MetadataURI { directory.uri }

  /// Waits for changes and tells of them; returns when there were some, when it is time to look at
  /// what has no head, or when the deadline of the call has passed. May be called again after an
  /// error.
  package func turn(_ call: MetadataCall) throws(EngineError) {
    do throws(EngineError) {
      let recheck = Deadline.after(milliseconds: Self.recheckMilliseconds)
      let wait = MetadataCall(
        until: headless.isEmpty ? call.deadline : min(call.deadline, recheck),
        cancellation: call.cancellation)
      for change in try watch.next(wait) { take(change) }
      try lookAtHeadless(MetadataCall(until: .never, cancellation: call.cancellation))
    } catch {
      if error.code != .canceled {
        patience = directory.now() &+ directory.ttlMilliseconds * 1_000_000
      }
      throw error
    }
  }

  private func take(_ change: MetadataChange) {
    let head: PayloadHead? =
      switch change {
      case .put(let entry): try? PayloadHead(json: entry.value)
      case .delete: nil
      }
    let key = MetadataKey(String(change.key.dropFirst(directory.headPrefix.count)))
    // What is malformed counts as absent.
    guard let head, MetadataKey(head.name) == key else {
      if case .put = change {
        headless[key] = .malformed
      } else {
        headless[key] = known[key] == nil ? nil : .gone
      }
      return
    }
    headless[key] = nil
    note(head.summary, key)
  }

  private func note(_ summary: PayloadSummary, _ key: MetadataKey) {
    let former = known.updateValue(summary, forKey: key)
    // Another holder that stands for the same version is no news.
    if former?.version == summary.version { return }
    let info = summary.info(holderCount: 1)
    tell(former == nil ? .appeared(info) : .changed(info))
  }

  private func lookAtHeadless(_ call: MetadataCall) throws(EngineError) {
    for (key, state) in headless.sorted(by: { $0.key < $1.key }) {
      if let now = try directory.listed(key.text, call) {
        note(now, key)
        continue
      }
      guard let told = known[key] else { continue }
      let isPatient = patience > directory.now()
      if isPatient, try !directory.removals(of: told.name, call).cover(told) { continue }
      // Nobody can stand for the name behind a malformed head, so that it is looked at for longer.
      if state == .gone { headless[key] = nil }
      known[key] = nil
      tell(.vanished(name: told.name))
    }
  }
}
