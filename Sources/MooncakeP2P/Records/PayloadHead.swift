import MooncakeBase
import MooncakeEngine

/// The record under a payload's name: its current version, and a holder that has all of it.
@dynamicMemberLookup
package struct PayloadHead: Equatable, Sendable {
  package var summary: PayloadSummary
  package var origin: HolderAddress

  package init(_ summary: PayloadSummary, origin: HolderAddress) {
    self.summary = summary
    self.origin = origin
  }

  package subscript<Value>(dynamicMember path: KeyPath<PayloadSummary, Value>) -> Value {
    summary[keyPath: path]
  }

  package var json: String {
    var writer = JSONWriter()
    writer.beginObject()
    summary.write(to: &writer)
    writer.name("origin")
    origin.write(to: &writer)
    writer.endObject()
    return writer.text
  }

  package init(json: String) throws(MooncakeError) {
    self = try PayloadSummary.read(json) { value throws(MooncakeError) in
      guard let origin = value["origin"] else { throw PayloadSummary.malformed("origin") }
      return PayloadHead(
        try PayloadSummary(parsing: value), origin: try HolderAddress(parsing: origin))
    }
  }
}
