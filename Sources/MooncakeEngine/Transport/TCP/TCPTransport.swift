import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// The TCP transport of one engine: its server, its client loops and its totals.
package final class TCPTransport: @unchecked Sendable {
  // Unchecked: everything is set in `init`.
  package struct Settings: Sendable {
    package var threadCount: Int
    package var connectionsPerPeer: Int
    package var spinNanoseconds: UInt64
    /// Where its threads run; nil for anywhere.
    package var processors: ProcessorSet?

    package init(
      threadCount: Int, connectionsPerPeer: Int, spinNanoseconds: UInt64,
      processors: ProcessorSet? = nil
    ) {
      self.threadCount = threadCount
      self.connectionsPerPeer = connectionsPerPeer
      self.spinNanoseconds = spinNanoseconds
      self.processors = processors
    }
  }

  package let counters = TCPCounters()
  package let loops: [TCPClientLoop]
  package let server: TCPServer
  private let settings: Settings
  /// How many peers there have been.
  private let peerCount = Atomic(0)
  private struct Weak { weak var ranges: UnfencedRanges? }
  /// By process that is written to.
  private let unfenced = Lock<[String: Weak]>([:])

  /// Serves on `listener` and starts the client threads.
  package init(
    listener: consuming Socket, buffers: BufferTable, settings: Settings, drivers: DriverTable
  ) throws(MooncakeError) {
    self.settings = settings
    var loops: [TCPClientLoop] = []
    do throws(Errno) {
      for _ in 0..<settings.threadCount {
        let loop = try TCPClientLoop(
          counters: counters, spinNanoseconds: settings.spinNanoseconds)
        guard let bit = drivers.add(loop) else { throw Errno(ENOSPC) }
        loop.driverBit = bit
        loops.append(loop)
      }
    } catch {
      throw MooncakeError(.system, "starting the TCP transport: \(error)")
    }
    self.loops = loops
    server = try TCPServer(
      listener: listener, buffers: buffers, counters: counters, settings: settings)
    do throws(Errno) {
      for (number, loop) in loops.enumerated() {
        try loop.start(name: "mc-tcp-io\(number)", on: settings.processors)
      }
    } catch {
      stop()
      throw MooncakeError(.system, "starting a TCP thread: \(error)")
    }
  }

  /// The connections to a descriptor's data port; each is made when it is first used.
  package func connect(
    to descriptor: SegmentDescriptor, deadline: Deadline, handlers: TCPPeer.Handlers
  ) throws(MooncakeError) -> TCPConnectionGroup {
    guard descriptor.tcpDataPort != 0 else {
      throw MooncakeError(
        .unsupported,
        "segment \(descriptor.name): the peer serves '\(descriptor.protocolName)' and no TCP: "
          + "start it with TCP, for example with MC_FORCE_TCP=1")
    }
    let host = Self.dataHost(of: descriptor)
    let addresses: [SocketAddress]
    do throws(ResolveError) {
      addresses = try Resolver.resolve(host, port: descriptor.tcpDataPort, deadline: deadline)
    } catch {
      throw MooncakeError(
        error.isTimeout ? .timeout : .unresolved,
        "segment \(descriptor.name): resolving the data host '\(host)': \(error)")
    }
    let peer = TCPPeer(
      segmentName: descriptor.name, addresses: addresses,
      usesAcknowledgments: descriptor.tcpProtocolVersion >= 2 && !Self.forcesVersion1,
      unfenced: unfencedRanges(of: descriptor, addresses[0]), handlers: handlers)
    // Spreads peers over the loops, as most use only their first connection.
    let peerIndex = peerCount.wrappingAdd(1, ordering: .relaxed).oldValue
    return TCPConnectionGroup(
      peer: peer, connectionCount: settings.connectionsPerPeer, loops: loops,
      firstLoop: peerIndex % loops.count)
  }

  /// The unfenced ranges of a descriptor's process. They outlive its peers: a process that moved,
  /// or whose segment was closed and is opened again, has the same memory.
  private func unfencedRanges(
    of descriptor: SegmentDescriptor, _ address: SocketAddress
  ) -> UnfencedRanges {
    let process =
      descriptor.incarnation != 0 ? String(descriptor.incarnation, radix: 16) : "\(address)"
    return unfenced.withLock { table in
      if let known = table[process]?.ranges { return known }
      let new = UnfencedRanges()
      table = table.filter { $0.value.ranges != nil }
      table[process] = Weak(ranges: new)
      return new
    }
  }

  private static func dataHost(of descriptor: SegmentDescriptor) -> String {
    if !descriptor.tcpDataHost.isEmpty { return descriptor.tcpDataHost }
    return (try? HostPort(parsing: descriptor.name))?.host ?? descriptor.name
  }

  private static let forcesVersion1 = Environment["MC_TCP_PROTO"] == "1"

  static func prepare() { _ = forcesVersion1 }

  /// Ends every transfer and connection; idempotent.
  package func stop() {
    for loop in loops { loop.stop() }
    server.stop()
  }
}
