/// When a download gives up. What holders say keeps it going for a bounded time only; bytes do for
/// as long as they come.
extension DownloadPlan {
  /// Whether there is nobody left to hope for, and nothing on its way.
  package func isStuck(_ now: UInt64) -> Bool {
    !isComplete && lastByte != nil && now > surrenderTime && reads.isEmpty && !isDiscovering
      && !neighbors.contains { isAwaited($0, now) }
  }

  /// Whether a question to it is on its way. One that takes too long is to a holder that sends what
  /// it must say first byte by byte.
  private func isAwaited(_ neighbor: Neighbor, _ now: UInt64) -> Bool {
    guard let ask = neighbor.asked else { return false }
    return now < ask.since &+ settings.starvedNanoseconds
  }

  /// Whether nobody that is known may send what is missing: those who live have only what is here
  /// too, as receivers do that all lost the same holder. They may get more yet, and the dead may
  /// come back: whoever has no better use for the time waits until it is stuck.
  package func isForsaken(_ now: UInt64) -> Bool {
    guard let lastByte, !isComplete, reads.isEmpty else { return false }
    return now >= lastByte &+ settings.forsakenNanoseconds
      && !neighbors.contains { mayHelp($0, now) }
  }

  private func mayHelp(_ neighbor: Neighbor, _ now: UInt64) -> Bool {
    guard neighbor.isAlive, !neighbor.isMute else { return false }
    guard let held = neighbor.heldCount else {
      return neighbor.asked.map { now < $0.since &+ settings.forsakenNanoseconds } ?? true
    }
    return held >= shardCount || neighbor.putsOff
  }

  /// When it gives up, if no byte arrives before.
  var surrenderTime: UInt64 {
    guard let lastByte else { return .max }
    let latest = lastByte &+ settings.queuedNanoseconds
    let isIsolated = !neighbors.contains(where: \.isAlive)
    let isolated =
      onlyCorruptAreKnown ? settings.corruptNanoseconds : settings.isolatedNanoseconds
    return min(
      latest,
      isIsolated
        ? max(lastByte, lastAnswer) &+ isolated
        : max(lastByte, lastBusy) &+ settings.starvedNanoseconds)
  }

  /// Nobody is waited for who might come back.
  private var onlyCorruptAreKnown: Bool {
    !corrupt.isEmpty && neighbors.allSatisfy(\.isBanned)
      && tried.allSatisfy { failed in
        gone.contains(failed.holder.holding)
          || corrupt.contains { $0.holder == failed.holder }
      }
  }

  /// No question is sent and no read begun from then on.
  var isOver: Bool { !isComplete && clock > surrenderTime }

  /// Ends what is still read.
  mutating func surrender() {
    for index in neighbors.indices
    where neighbors[index].readCount > 0 && !neighbors[index].isDropped {
      note(neighbors[index].address, Self.muteReason)
      neighbors[index].isMute = true
      neighbors[index].isDropped = true
      cancelReads(of: neighbors[index].address)
    }
  }
}
