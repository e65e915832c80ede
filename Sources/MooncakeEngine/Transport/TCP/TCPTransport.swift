import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// The TCP transport of one engine: its server, its client loops and its totals.
package final class TCPTransport: Transport, @unchecked Sendable {
  // Unchecked: everything is set in `init`.
  package static let name = "tcp"

  package let counters = TCPCounters()
  package let loops: [TCPClientLoop]
  package let server: TCPServer
  private let advertisedHost: String
  private let connectionsPerPeer: Int
  private let gates: WriteGates
  /// How many peers there have been.
  private let peerCount = Atomic(0)

  /// Listens, serves peers and starts the client threads.
  package init(_ context: TransportContext) throws(MooncakeError) {
    // The data port listens before anything publishes it.
    let listener = try context.address.openDataListener()
    advertisedHost = context.address.advertisedHost
    connectionsPerPeer = context.connectionsPerPeer
    gates = context.gates
    var loops: [TCPClientLoop] = []
    do throws(Errno) {
      for _ in 0..<context.threadCount {
        let loop = try TCPClientLoop(
          counters: counters, spinNanoseconds: context.spinNanoseconds)
        loops.append(loop)
      }
    } catch {
      throw MooncakeError(.system, "starting the TCP transport: \(error)")
    }
    self.loops = loops
    server = try TCPServer(
      listener: listener, buffers: context.buffers, counters: counters,
      threadCount: context.threadCount, spinNanoseconds: context.spinNanoseconds,
      processors: context.processors)
    do throws(Errno) {
      for (number, loop) in loops.enumerated() {
        try loop.start(name: "mc-tcp-io\(number)", on: context.processors)
      }
      // Last: a driver is never taken off the table.
      for loop in loops {
        guard let bit = context.drivers.add(loop) else { throw Errno(ENOSPC) }
        loop.driverBit = bit
      }
    } catch {
      stop()
      throw MooncakeError(.system, "starting a TCP thread: \(error)")
    }
  }

  package var name: String { Self.name }

  package func describe(in descriptor: inout SegmentDescriptor) {
    // Peers of every version choose it by this name.
    descriptor.protocolName = Self.name
    descriptor.tcpDataHost = advertisedHost
    descriptor.tcpDataPort = server.address.port
  }

  /// A path to a descriptor's data port, whose connections are made when they are first used.
  package func connect(
    to descriptor: SegmentDescriptor, former: [any Path], for link: SegmentLink, deadline: Deadline
  ) throws(MooncakeError) -> [any Path] {
    guard descriptor.tcpDataPort != 0 else {
      // A peer of ours that is without TCP has no other name for what it serves.
      let other = descriptor.protocolName == Self.name ? "" : "'\(descriptor.protocolName)' and "
      throw MooncakeError(
        .unsupported,
        "the peer serves \(other)no TCP: start it with TCP, for example with MC_FORCE_TCP=1")
    }
    let place = TCPPeer.Place(descriptor)
    for case let path as TCPPath in former where path.peer.place == place { return [path] }
    let host = Self.dataHost(of: descriptor)
    let addresses: [SocketAddress]
    do throws(ResolveError) {
      addresses = try Resolver.resolve(host, port: descriptor.tcpDataPort, deadline: deadline)
    } catch {
      throw MooncakeError(
        error.isTimeout ? .timeout : .unresolved, "resolving the data host '\(host)': \(error)")
    }
    let peer = TCPPeer(
      place: place, addresses: addresses,
      usesAcknowledgments: descriptor.tcpProtocolVersion >= 2 && !Self.forcesVersion1,
      gate: gates.gate(of: descriptor, address: "\(addresses[0])"), link: link)
    // Spreads peers over the loops, as most use only their first connection.
    let peerIndex = peerCount.wrappingAdd(1, ordering: .relaxed).oldValue
    return [
      TCPPath(
        peer: peer, connectionCount: connectionsPerPeer, loops: loops,
        firstLoop: peerIndex % loops.count)
    ]
  }

  private static func dataHost(of descriptor: SegmentDescriptor) -> String {
    if !descriptor.tcpDataHost.isEmpty { return descriptor.tcpDataHost }
    return (try? HostPort(parsing: descriptor.name))?.host ?? descriptor.name
  }

  package func revoke(_ buffers: [BufferTable.Buffer], until call: Call) -> String? {
    server.revoke(buffers.map(\.range))
    return nil
  }

  private static let forcesVersion1 = Environment["MC_TCP_PROTO"] == "1"

  static func prepare() { _ = forcesVersion1 }

  package func stop(until deadline: Deadline) -> String? {
    stop()
    return nil
  }

  /// Ends every transfer and connection; idempotent.
  package func stop() {
    for loop in loops { loop.stop() }
    server.stop()
  }
}

// MARK: - Counters

extension TCPTransport {
  package var totals: TransportTotals {
    TransportTotals(
      readBytes: counters.readBytes, writtenBytes: counters.writtenBytes,
      completedSlices: counters.completedSlices, failedSlices: counters.failedSlices)
  }

  package var metrics: [TransportCounter] {
    func gauge(_ value: Int) -> UInt64 { UInt64(max(0, value)) }
    return [
      .init("retried_slices", "Slices queued again.", counters.retries.load(ordering: .relaxed)),
      .init(
        "connect_failures", "Data connections that could not be made.",
        counters.clientConnectFailures.load(ordering: .relaxed)),
      .init(
        "disconnects", "Data connections lost or taken out of use.",
        counters.clientDisconnects.load(ordering: .relaxed)),
      .init(
        "client_connections", "Data connections to peers.",
        gauge(counters.clientConnections.load(ordering: .relaxed)), kind: .gauge),
      .init(
        "fenced_connections",
        "Connections given up with unanswered writes that the peer has not closed yet.",
        gauge(counters.fences.load(ordering: .relaxed)), kind: .gauge),
      .init(
        "server_connections", "Data connections of peers.",
        gauge(counters.connections.load(ordering: .relaxed)), kind: .gauge),
      .init(
        "served_requests", "Requests of peers served.",
        counters.servedRequests.load(ordering: .relaxed)),
      .init(
        "refused_requests", "Requests of peers refused.",
        counters.rejections.load(ordering: .relaxed)),
      .init(
        "served_received_bytes", "Bytes that peers sent to the data port.",
        counters.servedReceivedBytes.load(ordering: .relaxed)),
      .init(
        "served_sent_bytes", "Bytes that the data port sent to peers.",
        counters.servedSentBytes.load(ordering: .relaxed)),
    ]
  }
}
