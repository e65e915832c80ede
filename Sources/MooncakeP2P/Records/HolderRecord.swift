import MooncakeBase
import MooncakeEngine

/// A holding as its process publishes it: no other process writes it, and it vanishes with its
/// lease.
@dynamicMemberLookup
package struct HolderRecord: Equatable, Sendable {
  package var summary: PayloadSummary
  package var holder: HolderAddress
  /// Whether the process registered the payload rather than fetched it.
  package var isOrigin: Bool
  package var isComplete: Bool
  /// Whether the process knows that the name has a newer version.
  package var isSuperseded: Bool

  package init(
    _ summary: PayloadSummary, holder: HolderAddress, isOrigin: Bool, isComplete: Bool,
    isSuperseded: Bool = false
  ) {
    self.summary = summary
    self.holder = holder
    self.isOrigin = isOrigin
    self.isComplete = isComplete
    self.isSuperseded = isSuperseded
  }

  /// The holder that a head names, from what the head says about it.
  package init(origin head: PayloadHead) {
    self.init(head.summary, holder: head.origin, isOrigin: true, isComplete: true)
  }

  package subscript<Value>(dynamicMember path: KeyPath<PayloadSummary, Value>) -> Value {
    summary[keyPath: path]
  }

  package var json: String {
    var writer = JSONWriter()
    writer.beginObject()
    summary.write(to: &writer)
    writer.name("holder")
    holder.write(to: &writer)
    writer.name("origin")
    writer.value(isOrigin)
    writer.name("complete")
    writer.value(isComplete)
    if isSuperseded {
      writer.name("superseded")
      writer.value(true)
    }
    writer.endObject()
    return writer.text
  }

  package init(json: String) throws(MooncakeError) {
    self = try PayloadSummary.read(json) { value throws(MooncakeError) in
      guard let holder = value["holder"] else { throw PayloadSummary.malformed("holder") }
      return HolderRecord(
        try PayloadSummary(parsing: value), holder: try HolderAddress(parsing: holder),
        isOrigin: value["origin"]?.isTrue ?? false,
        isComplete: value["complete"]?.isTrue ?? false,
        isSuperseded: value["superseded"]?.isTrue ?? false)
    }
  }

  /// What callers of the store see.
  package var payloadHolder: PayloadHolder {
    PayloadHolder(
      segment: holder.segment, version: summary.version, isOrigin: isOrigin,
      isComplete: isComplete)
  }
}
