import MooncakeBase
import MooncakeSystem
import Synchronization

/// A transport that engines can use.
package struct TransportKind: Sendable {
  /// As in options.
  package let name: String
  /// Puts it in order with others where options do not name it: less is preferred.
  package let cost: Int
  /// Whether an engine that has asked for it starts without it where the system forbids it.
  package let isOptional: Bool
  package let make: @Sendable (TransportContext) throws(MooncakeError) -> any Transport

  package init(
    _ name: String, cost: Int = 5, isOptional: Bool = false,
    make: @escaping @Sendable (TransportContext) throws(MooncakeError) -> any Transport
  ) {
    self.name = name
    self.cost = cost
    self.isOptional = isOptional
    self.make = make
  }
}

/// The transports of this process: a new one is listed here and nowhere else.
package enum TransportRegistry {
  private static let kinds = Lock<[TransportKind]>([
    TransportKind(SharedMemoryTransport.name, cost: 0, isOptional: true) {
      context throws(MooncakeError) in try SharedMemoryTransport(context)
    },
    TransportKind(TCPTransport.name, cost: 10) {
      context throws(MooncakeError) in try TCPTransport(context)
    },
  ])

  /// What `MC_FORCE_TCP` leaves.
  package static let streamName = TCPTransport.name

  static func prepare() {
    _ = kinds.withLock { $0.count }
    _ = streamName
    TCPTransport.prepare()
    _ = (TCPServerLoop.okFrame, TCPServerLoop.rejectedFrame, SharedMemoryPeer.View.empty)
  }

  /// Adds a kind, or replaces the one with its name.
  package static func add(_ kind: TransportKind) {
    kinds.withLock { kinds in
      kinds.removeAll { $0.name == kind.name }
      kinds.append(kind)
    }
  }

  package static var names: [String] { kinds.withLock { $0.map(\.name) } }

  /// Throws if there is no transport of this name.
  package static func kind(named name: String) throws(MooncakeError) -> TransportKind {
    if let kind = kinds.withLock({ $0.first { $0.name == name } }) { return kind }
    throw MooncakeError(
      .unsupported,
      "transport '\(name.prefix(100))' is not available in this version: use "
        + names.joined(separator: " or "))
  }
}

extension TransferEngine {
  /// The engine's TCP transport, if it has one.
  package var tcp: TCPTransport? { transports.first() }

  /// The engine's shared-memory transport, if it has one.
  package var sharedMemory: SharedMemoryTransport? { transports.first() }

  /// The shared-memory peer of a segment, if there is one.
  package func sharedMemoryPeer(of id: SegmentID) throws(MooncakeError) -> SharedMemoryPeer? {
    try segments.segment(id).route.paths.lazy.compactMap { $0 as? SharedMemoryPath }.first?.peer
  }

  /// Why shared memory is not used for a segment's peer, if the peer is on this host.
  package func sharedMemoryFailure(of id: SegmentID) throws(MooncakeError) -> String? {
    try segments.segment(id).route.paths.first { $0 is SharedMemoryPath }?.health.failure
  }

  /// Where peers reach the data port, "host:port"; empty without TCP.
  public var dataAddress: String { tcp?.server.address.description ?? "" }
}
