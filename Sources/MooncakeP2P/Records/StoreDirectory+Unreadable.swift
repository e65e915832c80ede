import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

/// Entries of a metadata service that cannot be read here, because they are malformed or need a
/// later version of the store.
extension StoreDirectory {
  /// How many keys are remembered and reported.
  private static let unreadableCount = 256
  /// How many records of a name are searched for a reason.
  private static let lookCount = 64

  /// What could not be read so far, and why, in order of keys.
  package var passedOver: [String] {
    unreadable.withLock { $0 }.sorted { $0.key < $1.key }.map {
      PrintableText.make(complaint($0.key.text, $0.value))
    }
  }

  private func complaint(_ key: String, _ reason: String) -> String {
    "metadata \(uri): key '\(key)' is passed over: \(reason)"
  }

  /// The result of `read`; nil if it throws, which is logged once per key.
  func readable<Value>(
    _ key: String, _ read: () throws(MooncakeError) -> Value
  ) -> Value? {
    do throws(MooncakeError) { return try read() } catch {
      tellUnreadable(key, error.message)
      return nil
    }
  }

  /// Logs once per key why its entry is skipped.
  func tellUnreadable(_ key: String, _ reason: String) {
    let isNew = unreadable.withLock { reasons in
      if reasons.count >= Self.unreadableCount { return false }
      return reasons.updateValue(reason, forKey: MetadataKey(key)) == nil
    }
    if isNew { Log.warning(complaint(key, reason)) }
  }

  /// Throws if a holder's record of a name, or of one version of it, needs a later version of the
  /// store. Checked before reporting that nobody holds it.
  package func refuseLaterRecords(
    of name: String, version: PayloadVersion? = nil, _ call: Call
  ) throws(MooncakeError) {
    let prefix = version.map { holderPrefix(name, $0) } ?? holderPrefix(name)
    let page = try store.list(prefix: prefix, from: nil, limit: Self.lookCount, call)
    for entry in page.entries {
      do throws(MooncakeError) { _ = try HolderRecord(json: entry.value) } catch {
        if error.code == .unsupported { throw refusal(entry.key, error) }
      }
    }
  }

  /// Why the head of a name cannot be read, if it needs a later version of the store.
  func refusal(ofHead name: String, _ text: String?) -> MooncakeError? {
    guard let text else { return nil }
    do throws(MooncakeError) { _ = try PayloadHead(json: text) } catch {
      if error.code == .unsupported { return refusal(headKey(name), error) }
    }
    return nil
  }

  /// The error of a call that fails because of an entry.
  func refusal(_ key: String, _ error: MooncakeError) -> MooncakeError {
    MooncakeError(error.code, "metadata \(uri): key '\(key)': \(error.message)")
  }
}
