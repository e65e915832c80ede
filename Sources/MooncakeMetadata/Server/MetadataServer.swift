import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// An HTTP metadata server inside this process, on one thread, `mc-metaserver`. Serves every
/// process that is given "http://host:port/metadata", including Mooncake's.
public final class MetadataServer: Sendable {
  public struct Options: Sendable {
    /// Numeric address to listen on. Anybody who reaches it, and has the token if there is one, may
    /// read and change everything.
    public var host = "127.0.0.1"
    /// 0 lets the system choose.
    public var port: UInt16 = 0
    /// Directory in which the contents survive the server; nil keeps them in memory only.
    public var directory: String?
    /// Limit on the bytes of keys and values.
    public var maximumBytes = 1 << 30
    /// The token that clients must present; nil takes `MC_METADATA_HTTP_TOKEN`, or none if that is
    /// not set.
    public var token: String?

    public init() {}
  }

  /// Where it listens.
  public let address: HostPort
  private let loop: MetadataServerLoop
  // The thread, until it has been joined.
  private let thread: Lock<WorkerThread?>

  /// Starts serving; the server listens when this returns.
  public convenience init(_ options: Options = Options()) throws(MooncakeError) {
    var limits = MetadataLimits()
    guard (1 << 20...1 << 40).contains(options.maximumBytes) else {
      throw MooncakeError(.invalidArgument, "metadata server: the limit must be 1 MiB to 1 TiB")
    }
    limits.totalBytes = options.maximumBytes
    try self.init(options, limits)
  }

  package init(
    _ options: Options, _ limits: MetadataLimits, disk: MetadataJournal.Disk = .init()
  ) throws(MooncakeError) {
    MetadataGlobals.prepare()
    guard let target = SocketAddress(numeric: options.host, port: options.port) else {
      throw MooncakeError(
        .invalidArgument,
        "metadata server: host \(String(reflecting: String(options.host.prefix(100)))) is not a "
          + "numeric address: give one, such as 127.0.0.1 or 0.0.0.0")
    }
    let token = try Self.token(options)
    if token == nil && !target.isLoopback {
      Log.warning(
        "metadata server: it listens on \(target.host) and asks for no token, so anybody who "
          + "reaches it may read and change everything: set \(MetadataToken.variable) here and at "
          + "every client, or listen on 127.0.0.1")
    }
    var now = timespec()
    clock_gettime(CLOCK_REALTIME, &now)
    let revision = UInt64(max(0, now.tv_sec)) &* 1_000_000 &+ UInt64(now.tv_nsec / 1000)
    var rules = MetadataRules(table: MetadataTable(revision: revision, limits: limits))
    let journal = try Self.openJournal(options, disk, &rules)
    let listener = try Self.listen(on: target)
    address = try Self.address(of: listener)
    let loop = try MetadataServerLoop(
      listener: listener, rules: rules, journal: journal, token: token)
    self.loop = loop
    do throws(Errno) {
      thread = Lock(try WorkerThread.start(name: "mc-metaserver") { loop.run() })
    } catch {
      throw MooncakeError(.system, "metadata server: cannot start a thread: \(error)")
    }
  }

  private static func openJournal(
    _ options: Options, _ disk: MetadataJournal.Disk, _ rules: inout MetadataRules
  ) throws(MooncakeError) -> MetadataJournal? {
    guard let directory = options.directory else { return nil }
    rules.table.startRestore()
    let journal = try MetadataJournal(directory: directory, disk: disk) { rules.replay($0) }
    rules.table.finishRestore()
    let (used, limit) = (rules.table.usedBytes, rules.table.limits.totalBytes)
    if used <= limit { return journal }
    let mebibytes = (used + (1 << 20) - 1) >> 20
    throw MooncakeError(
      .invalidArgument,
      "metadata server: \(directory): its contents take \(used) bytes, and the limit is "
        + "\(limit): start with --memory \(mebibytes)MiB or more (maximum_bytes in C), or with "
        + "another directory to start empty; nothing is lost")
  }

  private static func token(_ options: Options) throws(MooncakeError) -> MetadataToken? {
    if let text = options.token {
      return try MetadataToken(text, from: "metadata server: the token")
    }
    guard let text = Environment[MetadataToken.variable], !text.isEmpty else { return nil }
    return try MetadataToken(text, from: "metadata server: \(MetadataToken.variable)")
  }

  private static func listen(on target: SocketAddress) throws(MooncakeError) -> Socket {
    do throws(Errno) {
      return try Socket.listening(on: target)
    } catch {
      throw MooncakeError(
        error.rawValue == EADDRINUSE ? .addressInUse : .system,
        "metadata server: listen on \(target): \(error)")
    }
  }

  private static func address(of listener: borrowing Socket) throws(MooncakeError) -> HostPort {
    do throws(Errno) {
      let bound = try listener.localAddress()
      return HostPort(host: bound.host, port: bound.port)
    } catch {
      throw MooncakeError(.system, "metadata server: \(error)")
    }
  }

  deinit { stop() }

  /// The URI under which this host's processes find it.
  public var uri: String {
    let isAny = SocketAddress(numeric: address.host, port: 0)?.isAny ?? false
    let host = !isAny ? address.host : address.host == "::" ? "::1" : "127.0.0.1"
    return "http://\(HostPort(host: host, port: address.port))/metadata"
  }

  /// Answers waiting requests, closes every connection and ends the thread; later calls do nothing.
  public func stop() {
    loop.requestStop()
    thread.withLock { thread in
      thread?.join()
      thread = nil
    }
  }
}
