/// What peers may do with a buffer.
public struct Access: OptionSet, Sendable, Hashable {
  public let rawValue: UInt32

  public init(rawValue: UInt32) { self.rawValue = rawValue }

  public static let remoteRead = Access(rawValue: 1)
  public static let remoteWrite = Access(rawValue: 2)
  /// Only the process itself.
  public static let local: Access = []
}

/// A buffer as its owner publishes it.
public struct RemoteBuffer: Equatable, Sendable {
  public var address: UInt64
  /// Bytes, never 0; `address + length` does not wrap.
  public var length: UInt64
  public var access: Access

  /// Larger than any user address space, and small enough that sums of many stay far from overflow.
  package static let lengthLimit: UInt64 = 1 << 48

  public init(address: UInt64, length: UInt64, access: Access) {
    self.address = address
    self.length = length
    self.access = access
  }
}

/// What a process publishes about its segment: where to connect and what is registered.
public struct SegmentDescriptor: Equatable, Sendable {
  public var name: String
  /// "tcp", "rdma", ...: Mooncake chooses the transport by it.
  public var protocolName: String
  public var tcpDataHost: String
  /// 0 when the peer serves no TCP.
  public var tcpDataPort: UInt16
  /// 1: bare framing; 2: acknowledged framing.
  public var tcpProtocolVersion: Int
  /// Random per engine, so a restarted process can be told from its predecessor; 0 if the peer
  /// gives none.
  public var incarnation: UInt64
  /// Grows with every published change, in microseconds since 1970; 0 if the peer gives none.
  public var metadataVersion: UInt64 = 0
  /// The peer's host, as `HostIdentity` names it; empty if the peer gives none.
  public var hostIdentity = ""
  /// Name of the socket through which the peer shares memory with processes of its host; empty if
  /// it does not.
  public var sharedMemoryName = ""
  /// "host:port" where the peer answers RPCs; empty if the peer gives none, as when its name is
  /// that address.
  public var rpcAddress = ""
  /// What a transport tells its peers besides: a JSON text by the transport's name. Only that
  /// transport reads and writes it.
  package var sections: [String: String] = [:]
  /// In order of address.
  public var buffers: [RemoteBuffer]

  public init(
    name: String, protocolName: String = "tcp", tcpDataHost: String = "", tcpDataPort: UInt16 = 0,
    tcpProtocolVersion: Int = 2, incarnation: UInt64 = 0, buffers: [RemoteBuffer] = []
  ) {
    self.name = name
    self.protocolName = protocolName
    self.tcpDataHost = tcpDataHost
    self.tcpDataPort = tcpDataPort
    self.tcpProtocolVersion = tcpProtocolVersion
    self.incarnation = incarnation
    self.buffers = buffers
  }

  /// Whether the same process published `other` later. Older ones arrive from a lagging replica of
  /// the metadata service, or when two answers overtake each other.
  package func isOlder(than other: SegmentDescriptor) -> Bool {
    metadataVersion != 0 && metadataVersion < other.metadataVersion
      && incarnation == other.incarnation && tcpDataPort == other.tcpDataPort
      && tcpDataHost == other.tcpDataHost
  }
}
