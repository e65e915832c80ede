import MooncakeBase
import MooncakeSystem
import Synchronization

/// One peer's data port: what its connections share.
package final class TCPPeer: Sendable {
  /// Where a peer listens; another place needs other connections.
  struct Place: Equatable, Sendable {
    let name: String
    let host: String
    let port: UInt16
    let protocolVersion: Int
    let incarnation: UInt64

    init(_ descriptor: SegmentDescriptor) {
      name = descriptor.name
      host = descriptor.tcpDataHost
      port = descriptor.tcpDataPort
      protocolVersion = descriptor.tcpProtocolVersion
      incarnation = descriptor.incarnation
    }

    static func == (left: Place, right: Place) -> Bool {
      left.host == right.host && left.port == right.port
        && left.protocolVersion == right.protocolVersion && left.incarnation == right.incarnation
        && left.name.utf8.elementsEqual(right.name.utf8)
    }
  }

  package let description: String
  /// Version 1 framing acknowledges nothing, so every request gets a connection of its own.
  package let usesAcknowledgments: Bool
  /// Where its process may still store earlier writes; shared by all peers of that process.
  package let gate: WriteGate
  let place: Place
  let link: SegmentLink
  let mark: UInt64
  let health = PathHealth(isInUse: true)
  private let addresses: [SocketAddress]
  private let attempts = Atomic<Int>(0)
  private let retired = Atomic<Bool>(false)
  private let successorBox = Lock<PathSuccessor?>(nil)
  private let partialArrivals = Atomic<UInt64>(0)

  /// `addresses` is not empty.
  init(
    place: Place, addresses: [SocketAddress], usesAcknowledgments: Bool, gate: WriteGate,
    link: SegmentLink
  ) {
    description = "tcp peer \(addresses[0]) (segment \(place.name))"
    self.place = place
    self.addresses = addresses
    self.usesAcknowledgments = usesAcknowledgments
    self.gate = gate
    self.link = link
    mark = link.makeMark()
  }

  package var isOneShot: Bool { !usesAcknowledgments }

  package var isRetired: Bool { retired.load(ordering: .acquiring) }

  package var successor: PathSuccessor? { successorBox.withLock { $0 } }

  fileprivate func markRetired(_ successor: PathSuccessor?) {
    successorBox.withLock { $0 = successor }
    retired.store(true, ordering: .releasing)
  }

  /// The address for the next connect; all are used in turn.
  func nextAddress() -> SocketAddress {
    let index = attempts.wrappingAdd(1, ordering: .relaxed).oldValue
    return addresses[index % addresses.count]
  }

  /// Grows while data of incomplete reads arrives.
  fileprivate var partialArrivalCount: UInt64 { partialArrivals.load(ordering: .relaxed) }

  func countPartialArrival() { partialArrivals.wrappingAdd(1, ordering: .relaxed) }
}

/// The connections to one peer.
package final class TCPPath: Path {
  package let peer: TCPPeer
  package let endpoints: [TCPEndpoint]

  /// Smaller requests are chained, for few pushes and gathered sends.
  private static let smallBytes = 64 << 10
  /// Bytes of small requests that go to one connection before the next is chosen: moving less is
  /// faster than waking another thread.
  private static let chainBytes = 1 << 20
  /// Larger requests are cut, so that all connections share one request.
  private static let stripeBytes = 1 << 20

  /// The first connection belongs to the loop `firstLoop`; it alone serves a peer with little to
  /// do.
  init(peer: TCPPeer, connectionCount: Int, loops: [TCPClientLoop], firstLoop: Int) {
    self.peer = peer
    endpoints = (0..<connectionCount).map {
      TCPEndpoint(peer: peer, loop: loops[(firstLoop + $0) % loops.count])
    }
  }

  package var transportName: String { TCPTransport.name }
  package var description: String { peer.description }
  package var mark: UInt64 { peer.mark }
  package var health: PathHealth { peer.health }
  package var gate: WriteGate? { peer.gate }
  package var isUsable: Bool { peer.health.isInUse }
  package var partialArrivalCount: UInt64 { peer.partialArrivalCount }

  package var traits: PathTraits {
    var traits = PathTraits()
    traits.waitsForPeer = true
    traits.waitsForFences = true
    if !peer.isOneShot { traits.pieceBytes = Self.stripeBytes }
    return traits
  }

  package func mayProbe(_ now: UInt64) -> Bool {
    peer.health.beginProbe(now, until: now &+ TCPConnection.connectLimitNanoseconds)
  }

  package var load: Int {
    endpoints.reduce(0) { $0 + $1.load.load(ordering: .relaxed) }
  }

  package var movedBytes: UInt64 {
    endpoints.reduce(0) { $0 &+ $1.movedBytes.load(ordering: .relaxed) }
  }

  package func submit(_ run: inout SliceRun) {
    // Usual for many small requests: one chain for one connection.
    if run.byteCount <= Self.chainBytes, run.largestBytes < Self.smallBytes {
      let byteCount = run.byteCount
      return push(run.takeSlices(), byteCount, &run.drivers)
    }
    var chain = SliceQueue()
    var chainBytes = 0
    while let slice = run.popFirst() {
      let length = slice.pointee.length
      if length < Self.smallBytes || peer.isOneShot {
        chain.append(slice)
        chainBytes += length
        if chainBytes >= Self.chainBytes {
          push(chain.takeAll(), chainBytes, &run.drivers)
          chainBytes = 0
        }
      } else {
        var single = SliceQueue()
        single.append(slice)
        push(single, length, &run.drivers)
      }
    }
    if !chain.isEmpty { push(chain, chainBytes, &run.drivers) }
  }

  @inline(__always)
  private func push(
    _ slices: consuming SliceQueue, _ byteCount: Int, _ drivers: inout DriverSet
  ) {
    let endpoint = leastBusy()
    endpoint.push(slices, byteCount: byteCount)
    drivers.insert(endpoint.loop.driverBit)
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

  package func retire(successor: PathSuccessor?) {
    peer.markRetired(successor)
    for endpoint in endpoints {
      endpoint.loop.schedule(endpoint)
      endpoint.loop.kick()
    }
  }
}
