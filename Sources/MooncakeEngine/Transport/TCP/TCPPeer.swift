import MooncakeSystem
import Synchronization

/// One peer's data port: what its connections share.
package final class TCPPeer: Sendable {
  /// Where the transfers of a replaced peer go.
  package struct Successor: Sendable {
    /// The name now belongs to another process than the one that transfers were sent to.
    package var isRestarted: Bool
    package var resubmit: @Sendable (SlicePointer) -> Void
  }

  /// What a peer reports to its segment.
  package struct Handlers: Sendable {
    /// Connections fail: the descriptor may be out of date.
    package var trouble: @Sendable () -> Void
    /// The target refused a slice's range; the handler now owns the slice.
    package var refusal: @Sendable (SlicePointer) -> Void

    package init(
      trouble: @escaping @Sendable () -> Void, refusal: @escaping @Sendable (SlicePointer) -> Void
    ) {
      self.trouble = trouble
      self.refusal = refusal
    }
  }

  package let description: String
  /// Version 1 framing acknowledges nothing, so every request gets a connection of its own.
  package let usesAcknowledgments: Bool
  /// Where its process may still store earlier writes; shared by all peers of that process.
  package let unfenced: UnfencedRanges
  private let addresses: [SocketAddress]
  private let attempts = Atomic<Int>(0)
  private let handlers: Handlers
  private let retired = Atomic<Bool>(false)
  private let successorBox = Lock<Successor?>(nil)
  private let lastReport = Atomic<UInt64>(0)
  private let partialArrivals = Atomic<UInt64>(0)

  private static let reportNanoseconds: UInt64 = 100_000_000

  /// `addresses` is not empty.
  package init(
    segmentName: String, addresses: [SocketAddress], usesAcknowledgments: Bool,
    unfenced: UnfencedRanges, handlers: Handlers
  ) {
    description = "tcp peer \(addresses[0]) (segment \(segmentName))"
    self.addresses = addresses
    self.usesAcknowledgments = usesAcknowledgments
    self.unfenced = unfenced
    self.handlers = handlers
  }

  package var isOneShot: Bool { !usesAcknowledgments }

  package var isRetired: Bool { retired.load(ordering: .acquiring) }

  package var successor: Successor? { successorBox.withLock { $0 } }

  fileprivate func markRetired(_ successor: Successor?) {
    successorBox.withLock { $0 = successor }
    retired.store(true, ordering: .releasing)
  }

  /// The address for the next connect; all are used in turn.
  func nextAddress() -> SocketAddress {
    let index = attempts.wrappingAdd(1, ordering: .relaxed).oldValue
    return addresses[index % addresses.count]
  }

  /// Grows while data of incomplete reads arrives.
  package var partialArrivalCount: UInt64 { partialArrivals.load(ordering: .relaxed) }

  func countPartialArrival() { partialArrivals.wrappingAdd(1, ordering: .relaxed) }

  func reportTrouble() {
    let now = Clock.now()
    let last = lastReport.load(ordering: .relaxed)
    if now &- last < Self.reportNanoseconds { return }
    lastReport.store(now, ordering: .relaxed)
    handlers.trouble()
  }

  func reportRefusal(_ slice: SlicePointer) { handlers.refusal(slice) }
}

/// The connections to one peer.
package final class TCPConnectionGroup: Sendable {
  package let peer: TCPPeer
  package let endpoints: [TCPEndpoint]

  /// The first connection belongs to the loop `firstLoop`; it alone serves a peer with little to
  /// do.
  package init(peer: TCPPeer, connectionCount: Int, loops: [TCPClientLoop], firstLoop: Int) {
    self.peer = peer
    endpoints = (0..<connectionCount).map {
      TCPEndpoint(peer: peer, loop: loops[(firstLoop + $0) % loops.count])
    }
  }

  /// Takes the peer out of use: queued slices go to the successor; without one they end in the
  /// usual ways.
  package func retire(successor: TCPPeer.Successor?) {
    peer.markRetired(successor)
    for endpoint in endpoints {
      endpoint.loop.schedule(endpoint)
      endpoint.loop.kick()
    }
  }

  /// The connection with the least to do.
  @inline(__always)
  package func leastBusy() -> TCPEndpoint {
    var best = endpoints[0]
    var bestLoad = best.load.load(ordering: .relaxed)
    for index in 1..<endpoints.count where bestLoad > 0 {
      let load = endpoints[index].load.load(ordering: .relaxed)
      if load < bestLoad {
        best = endpoints[index]
        bestLoad = load
      }
    }
    return best
  }
}
