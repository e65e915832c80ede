/// The memory that the RPC daemon holds for its peers: unfinished requests and unsent answers.
/// Beyond the limit, a connection of the peer that holds most is closed, so that a hoarder cannot
/// shut out others.
struct RPCBudget {
  /// Bytes of outdated answers that connections are still sending; several connections may send the
  /// same one.
  final class SharedBytes {
    fileprivate(set) var count = 0
  }

  /// The connections of one peer, identified by its address.
  struct Group {
    var connectionCount = 0
    var byteCount = 0
  }

  let limit: Int
  let outdated = SharedBytes()
  private(set) var groups: [String: Group] = [:]
  private var ownBytes = 0

  init(limit: Int) { self.limit = limit }

  var isExceeded: Bool { ownBytes + outdated.count > limit }

  mutating func addConnection(_ group: String) {
    groups[group, default: Group()].connectionCount += 1
  }

  mutating func removeConnection(_ group: String) {
    groups[group]?.connectionCount -= 1
    if groups[group]?.connectionCount == 0 { groups[group] = nil }
  }

  /// Records a change of the bytes that a connection holds: its own, and those of an answer that it
  /// shares with other connections.
  mutating func change(_ group: String, from old: RPCConnection.Held, to new: RPCConnection.Held) {
    ownBytes += new.own - old.own
    groups[group]?.byteCount += new.total - old.total
  }

  /// The peers that hold the most bytes (`largest`) and the most connections (`busiest`).
  var largest: String? { groups.max { $0.value.byteCount < $1.value.byteCount }?.key }
  var busiest: String? { groups.max { $0.value.connectionCount < $1.value.connectionCount }?.key }
}

/// The bytes of an answer; every peer that asks for the descriptor gets the same object.
final class RPCOutput {
  let bytes: [UInt8]
  let isShared: Bool
  /// Whether the connection is kept open afterwards.
  let keeps: Bool
  private var outdated: RPCBudget.SharedBytes?

  init(_ bytes: [UInt8], isShared: Bool, keeps: Bool = false) {
    self.bytes = bytes
    self.keeps = keeps
    self.isShared = isShared
  }

  /// Counts the bytes in `sum` until the last connection that sends them is done.
  func outdate(_ sum: RPCBudget.SharedBytes) {
    outdated = sum
    sum.count += bytes.count
  }

  deinit { outdated?.count -= bytes.count }
}
