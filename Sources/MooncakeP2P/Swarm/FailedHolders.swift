/// The holders that failed during a download, and why.
struct FailedHolders: Sendable {
  /// The latest failure of each.
  private(set) var tried: [(holder: HolderAddress, reason: String)] = []
  /// Who sent a shard with wrong bytes, and the first such shard of each.
  private(set) var corrupt: [(holder: HolderAddress, shard: Int)] = []
  private(set) var corruptShardCount = 0
  /// Holdings that no longer have the payload.
  private var gone: Set<UInt64> = []

  private static let triedLimit = 32
  private static let corruptLimit = 32

  mutating func record(_ holder: HolderAddress, _ reason: String) {
    forget(holder)
    if tried.count == Self.triedLimit { gone.remove(tried.removeFirst().holder.holding) }
    tried.append((holder, reason))
  }

  mutating func recordCorruptShard(_ shard: Int, from holder: HolderAddress) {
    corruptShardCount += 1
    if corrupt.count < Self.corruptLimit && !corrupt.contains(where: { $0.holder == holder }) {
      corrupt.append((holder, shard))
    }
  }

  mutating func recordGone(_ holder: HolderAddress) { gone.insert(holder.holding) }

  /// The holder has answered, so it has the payload.
  mutating func recordPresent(_ holder: HolderAddress) { gone.remove(holder.holding) }

  /// The holder works again.
  mutating func forget(_ holder: HolderAddress) { tried.removeAll { $0.holder == holder } }

  /// Whether some sent wrong bytes, and every other one that failed no longer has the payload: none
  /// of them is worth waiting for.
  var areBeyondHope: Bool {
    !corrupt.isEmpty
      && tried.allSatisfy { failed in
        gone.contains(failed.holder.holding) || corrupt.contains { $0.holder == failed.holder }
      }
  }
}
