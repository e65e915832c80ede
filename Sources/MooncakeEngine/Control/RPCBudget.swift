/// What the RPC daemon holds in memory for its peers: unfinished requests and unsent answers.
/// Beyond the limit a connection of the peer that holds most is closed, so that nobody who hoards
/// keeps others away.
struct RPCBudget {
  /// Bytes of answers that several connections send and that the segment no longer gives out.
  final class SharedBytes {
    fileprivate(set) var count = 0
  }

  /// Connections of one peer, told by its address.
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

  /// Takes note that a connection holds other amounts than before: bytes of its own, and of an
  /// answer that it shares with others.
  mutating func change(_ group: String, from old: RPCConnection.Held, to new: RPCConnection.Held) {
    ownBytes += new.own - old.own
    groups[group]?.byteCount += new.total - old.total
  }

  /// The peer that holds most, and the one with most connections.
  var largest: String? { groups.max { $0.value.byteCount < $1.value.byteCount }?.key }
  var busiest: String? { groups.max { $0.value.connectionCount < $1.value.connectionCount }?.key }
}

/// The bytes of an answer; those of a descriptor are the same for every peer that asks for it.
final class RPCOutput {
  let bytes: [UInt8]
  let isShared: Bool
  /// Whether the connection rests afterwards.
  let keeps: Bool
  private var outdated: RPCBudget.SharedBytes?

  init(_ bytes: [UInt8], isShared: Bool, keeps: Bool = false) {
    self.bytes = bytes
    self.keeps = keeps
    self.isShared = isShared
  }

  /// From now on only those hold it that have not sent it yet.
  func outdate(_ sum: RPCBudget.SharedBytes) {
    outdated = sum
    sum.count += bytes.count
  }

  deinit { outdated?.count -= bytes.count }
}
