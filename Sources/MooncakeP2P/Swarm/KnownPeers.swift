/// Receivers that a holder has heard of lately, to be named to others as holders.
struct KnownPeers: Sendable {
  private struct Peer {
    var address: HolderAddress
    var lastHeard: UInt64
  }

  private var peers: [Peer] = []

  /// If there are enough, a newcomer replaces a random one: memory stays bounded, and dead ones
  /// disappear.
  mutating func remember(
    _ address: HolderAddress, limit: Int, _ random: inout SwarmRandom, now: UInt64
  ) {
    let peer = Peer(address: address, lastHeard: now)
    if let known = peers.firstIndex(where: { $0.address.holding == address.holding }) {
      peers[known] = peer
    } else if peers.count < limit {
      peers.append(peer)
    } else {
      peers[Int.random(in: peers.indices, using: &random)] = peer
    }
  }

  /// Some that were heard of within `maximumAge`, from a random one on.
  func some(
    except own: HolderAddress?, limit: Int, maximumAge: UInt64, _ random: inout SwarmRandom,
    now: UInt64
  ) -> [HolderAddress] {
    var told: [HolderAddress] = []
    let start = peers.isEmpty ? 0 : Int.random(in: peers.indices, using: &random)
    for step in peers.indices where told.count < limit {
      let peer = peers[(start + step) % peers.count]
      if peer.address.holding == own?.holding { continue }
      if now &- peer.lastHeard > maximumAge { continue }
      told.append(peer.address)
    }
    return told
  }
}
