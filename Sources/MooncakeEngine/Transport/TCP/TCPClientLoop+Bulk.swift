import Glibc

/// An endpoint's share in the bulk of its loop while many have some for peers of this host.
///
/// Few at once: what is in flight then stays in the caches between the two copies. Over a network
/// all links are used at once, since one may be much slower than this host.
struct BulkTurn {
  static let limit = 4
  /// What one may start before the next is let in.
  static let byteCount = 4 << 20
  /// What is received at a time: fewer wake-ups, and the peer is still sending meanwhile.
  static let receiveBytes = 256 << 10
  /// A peer that is silent for so long keeps nobody waiting.
  static let patienceNanoseconds: UInt64 = 2_000_000

  var isHeld = false
  /// The turn ended by silence; the next one comes after a sign of life.
  var isStalled = false
  var bytesLeft = 0
  private var lastProgress: UInt64 = 0

  /// Smaller requests never wait for a turn.
  @inline(__always)
  static func concerns(_ slice: SlicePointer) -> Bool { slice.pointee.length >= 64 << 10 }

  @inline(__always)
  mutating func progressed(_ now: UInt64) {
    lastProgress = now
    isStalled = false
  }

  fileprivate mutating func begin(_ now: UInt64) {
    isHeld = true
    bytesLeft = Self.byteCount
    lastProgress = now
  }

  fileprivate func isSilent(_ now: UInt64) -> Bool {
    now > lastProgress &+ Self.patienceNanoseconds
  }
}

extension TCPEndpoint {
  private var hasInFlight: Bool { sentCount > 0 || sendOffset > 0 }

  @inline(__always)
  var waitsForBulkTurns: Bool { loop.limitsBulk && peer.isLocal }

  /// While many peers send bulk, each wakes the loop when there is much to receive, never beyond
  /// the end of an answer. A refusal is noticed all the same, for the peer closes behind it. With
  /// few peers the stream of each keeps the loop awake, and waiting would only delay it.
  func adjustLowWater() {
    var wanted = 1
    if waitsForBulkTurns, sentCount > 0, let slice = queue.first, BulkTurn.concerns(slice),
      slice.pointee.opcode == .read
    {
      let statusBytes = isAcknowledged ? TCPWire.statusBytes : 0
      wanted = min(statusBytes + slice.pointee.length - receiveOffset, BulkTurn.receiveBytes)
    }
    if wanted == lowWater { return }
    var value = Int32(wanted)
    let size = socklen_t(MemoryLayout<Int32>.size)
    if setsockopt(descriptor, SOL_SOCKET, SO_RCVLOWAT, &value, size) == 0 { lowWater = wanted }
  }

  /// Whether the next large request may be sent.
  @inline(__always)
  var mayStartBulk: Bool { !waitsForBulkTurns || turn.isHeld && turn.bytesLeft > 0 }

  fileprivate var wantsBulkTurn: Bool {
    guard peer.isLocal, isConnected, !turn.isHeld, !turn.isStalled, let next = sendSlice else {
      return false
    }
    return BulkTurn.concerns(next)
  }

  /// Ends a turn that is used up or wasted; returns whether it goes on.
  fileprivate func keepsBulkTurn(_ now: UInt64) -> Bool {
    let isUsed = !hasInFlight && (turn.bytesLeft <= 0 || sendSlice == nil)
    turn.isStalled = !isUsed && turn.isSilent(now)
    turn.isHeld = !isUsed && !turn.isStalled
    return turn.isHeld
  }
}

extension TCPClientLoop {
  /// With few endpoints at work nobody waits.
  @inline(__always)
  var limitsBulk: Bool { active.count > BulkTurn.limit }

  /// Ends and begins turns at bulk.
  func giveBulkTurns() {
    hasWaitingBulk = false
    guard limitsBulk else { return }
    var held = 0
    for endpoint in active where endpoint.turn.isHeld && endpoint.keepsBulkTurn(now) { held += 1 }
    for _ in active.indices {
      bulkCursor = bulkCursor + 1 < active.count ? bulkCursor + 1 : 0
      let endpoint = active[bulkCursor]
      guard endpoint.wantsBulkTurn else { continue }
      if held == BulkTurn.limit {
        bulkCursor -= 1
        hasWaitingBulk = true
        return
      }
      endpoint.turn.begin(now)
      held += 1
      _ = endpoint.send()
    }
  }
}
