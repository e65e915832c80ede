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

  /// More than any address space holds, and few enough for sums of many to stay far from overflow.
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
  /// "tcp", "rdma", ...: how the existing system routes.
  public var protocolName: String
  public var tcpDataHost: String
  /// 0 when the peer serves no TCP.
  public var tcpDataPort: UInt16
  /// 1: bare framing, 2: acknowledged framing.
  public var tcpProtocolVersion: Int
  /// Random per engine: tells a restarted process from its former self; 0 when the peer says none.
  public var incarnation: UInt64
  /// Grows with every change of what is published, in microseconds since 1970; 0 when the peer says
  /// none.
  public var metadataVersion: UInt64 = 0
  /// Where the peer runs, as `HostIdentity` tells it; empty when the peer says none.
  public var hostIdentity = ""
  /// Socket under which processes of the same host share its memory; empty when it does not.
  public var sharedMemoryName = ""
  /// "host:port" where the peer answers RPCs; empty when the peer says none, as one whose name is
  /// that address.
  public var rpcAddress = ""
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

  /// Whether the same process has published the other after this one: a replica of the metadata
  /// service that lags behind, or two answers that overtook each other.
  package func isOlder(than other: SegmentDescriptor) -> Bool {
    metadataVersion != 0 && metadataVersion < other.metadataVersion
      && incarnation == other.incarnation && tcpDataPort == other.tcpDataPort
      && tcpDataHost == other.tcpDataHost
  }
}
