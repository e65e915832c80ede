/// Where a holder of a payload is asked and read.
package struct HolderAddress: Hashable, Sendable {
  /// Random; tells apart the holdings of all processes, and the same process before and after.
  package var holding: UInt64
  /// Where its process answers: "host:port".
  package var rpc: String
  /// The segment that its memory belongs to.
  package var segment: String

  package init(holding: UInt64, rpc: String, segment: String) {
    self.holding = holding
    self.rpc = rpc
    self.segment = segment
  }
}
