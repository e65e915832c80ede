/// Where a holder of a payload can be asked and read.
package struct HolderAddress: Hashable, Sendable {
  /// Random; differs between processes, and between a process's holdings over time.
  package var holding: UInt64
  /// Where its process answers questions: "host:port".
  package var rpc: String
  /// The segment that its memory belongs to.
  package var segment: String

  package init(holding: UInt64, rpc: String, segment: String) {
    self.holding = holding
    self.rpc = rpc
    self.segment = segment
  }
}
