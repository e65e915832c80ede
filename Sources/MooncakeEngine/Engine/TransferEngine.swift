import MooncakeBase
import MooncakeSystem
import Synchronization

/// Moves memory between this process and its peers. Owns registrations, connections and threads.
///
/// Methods may be called from any thread at any time. After `close` they throw.
public final class TransferEngine: @unchecked Sendable {
  // Unchecked: everything is set in `init` or synchronized.
  public struct Options: Sendable {
    /// Segment name; default "advertised host:port". Without a metadata service no other name
    /// works.
    public var name: String?
    /// Numeric address to listen on; by default the advertised address if given, else 127.0.0.1.
    public var bindAddress: String?
    /// Host that peers connect to; by default the bound address.
    public var advertisedAddress: String?
    /// RPC port; 0 lets the system choose.
    public var port: UInt16 = 0
    /// "P2PHANDSHAKE": peers ask each other. Otherwise the metadata service: "etcd://host:2379",
    /// "redis://host:6379" or "http://host:8080/metadata".
    public var metadataURI = "P2PHANDSHAKE"
    /// In order of preference. "shm" reaches processes of this host through shared memory; "tcp"
    /// reaches every peer. `MC_FORCE_TCP` in the environment leaves only "tcp".
    public var transports = ["shm", "tcp"]
    /// Timeout of operations that give none.
    public var defaultTimeoutMilliseconds: UInt64 = 30_000
    /// Threads per direction; 0 chooses by the number of processors.
    public var ioThreads = 0
    /// Processors for the threads that move bytes: a list such as "0-3,8", or "node:1" for a NUMA
    /// node; nil for any.
    public var processors: String?
    /// Data connections to one peer; 0 chooses.
    public var connectionsPerPeer = 0
    /// How long waiters and I/O threads spin before they sleep while work is outstanding.
    public var spinMicroseconds = 50
    package var listenRules = ListenRules.native

    public init() {}
  }

  /// What happens if a port is taken or a name does not fit.
  package enum ListenRules: Sendable {
    /// Exactly as asked, or an error.
    case native
    /// As programs written for Mooncake expect.
    case dropIn(DropInListenOptions)
  }

  /// The segment name under which peers open this engine.
  public let name: String
  /// The advertised host with the RPC daemon's port.
  public let rpcAddress: HostPort
  package let local: LocalSegment
  package let router: Router
  package let batches = BatchTable()
  package let transports: AttachedTransports
  package let workers = WorkerPool(name: "mc-worker", threadLimit: 8)
  package let callbacks = WorkerPool(name: "mc-callback", threadLimit: 1)
  package let notifications = NotificationQueue()
  package let services = ServiceTable()
  package let caller: RPCCaller
  /// Notifications that wait for a thread.
  let deliveries: LateWork
  /// nil without a metadata service.
  package let directory: MetadataDirectory?
  package let publisher: MetadataPublisher?
  package let mappings = Lock<[UInt64: EngineMemory]>([:])
  /// Start addresses of buffers whose unregistration gave up waiting for a peer.
  package let unfinished = Lock<Set<UInt64>>([])
  package let engineEvent = Atomic<Int32>(-1)
  package let spareBatches = Lock<[Batch]>([])
  package let defaultTimeoutMilliseconds: UInt64
  let contextBox = Lock<TransportContext?>(nil)

  /// Becomes readable when the engine closes, so that calls stop waiting for peers.
  package let closeEvent: EventFD
  private let rpc: RPCServer
  private let closeLock = Lock(false)
  private let attachLock = Lock(false)

  /// Creates an engine; its ports listen when this returns.
  public convenience init(_ options: Options = Options()) throws(MooncakeError) {
    EngineGlobals.prepare()
    try Self.validate(options)
    let directory = try Self.openDirectory(options)
    let opened = try Self.listen(options, usesService: directory != nil)
    try self.init(options, opened, directory)
  }

  private init(
    _ options: Options, _ opened: consuming OpenedListener, _ directory: MetadataDirectory?
  ) throws(MooncakeError) {
    caller = RPCCaller()
    deliveries = LateWork(caller)
    defaultTimeoutMilliseconds = options.defaultTimeoutMilliseconds

    do throws(Errno) { closeEvent = try EventFD() } catch {
      throw MooncakeError(.system, "creating an engine: \(error)")
    }
    let address = opened.address
    name = address.name
    rpcAddress = HostPort(host: address.advertisedHost, port: address.port)
    let processors = try Self.processors(options)
    let names = Self.transportNames(options)
    var identity = SegmentDescriptor(
      name: address.name, protocolName: names.first ?? "", incarnation: .random(in: 1 ... .max))
    if directory != nil { identity.rpcAddress = rpcAddress.description }
    local = LocalSegment(identity: identity)
    router = Router(local: local, spinNanoseconds: UInt64(options.spinMicroseconds) * 1000)
    transports = AttachedTransports(preference: names)
    self.directory = directory
    let untilClose = Call(until: .never, cancellation: closeEvent.descriptor.rawValue)
    publisher = directory.map { [local, rpcAddress] directory in
      MetadataPublisher(directory, local, rpcAddress: rpcAddress, untilClose: untilClose)
    }
    let context = TransportContext(
      buffers: local.buffers, drivers: router.drivers, gates: WriteGates(), address: address,
      threadCount: Self.threadCount(options, processors),
      connectionsPerPeer: options.connectionsPerPeer == 0 ? 2 : options.connectionsPerPeer,
      spinNanoseconds: router.spinNanoseconds, processors: processors,
      cancellation: closeEvent.descriptor.rawValue,
      background: { [workers] body in workers.run(body) })
    contextBox.withLock { $0 = context }
    try Self.start(names, context, transports)
    for transport in transports.all { local.add(Self.describer(of: transport)) }
    let handlers = RPCServer.Handlers(
      descriptor: { [local] in local.json },
      notify: { [notifications] in notifications.append($0) },
      service: { [services] in services.answer($0) })
    do throws(MooncakeError) {
      rpc = try RPCServer(listener: opened.listener, handlers: handlers)
    } catch {
      for transport in transports.all { _ = transport.stop(until: .never) }
      throw error
    }
    router.host = self
    _ = try segments.insert(
      name,
      route: transports.connect(
        to: ownDescriptor, former: nil, link: SegmentLink(name, router),
        deadline: .after(milliseconds: 5000)))
    try startPublishing()
  }

  /// Starts the transports that options name. Optional ones may be missing where others work.
  private static func start(
    _ names: [String], _ context: TransportContext, _ transports: AttachedTransports
  ) throws(MooncakeError) {
    var last: MooncakeError?
    for name in names {
      let kind = try TransportRegistry.kind(named: name)
      do throws(MooncakeError) {
        transports.add(try kind.make(context), cost: kind.cost)
      } catch {
        last = error
        if kind.isOptional {
          Log.info(error.message)
          continue
        }
        for transport in transports.all { _ = transport.stop(until: .never) }
        throw error
      }
    }
    if transports.all.isEmpty, let last { throw last }
  }

  private static func describer(of transport: any Transport) -> LocalSegment.Describer {
    .init(bytesPerBuffer: transport.describedBytesPerBuffer) { transport.describe(in: &$0) }
  }

  private static func transportNames(_ options: Options) -> [String] {
    Environment["MC_FORCE_TCP"] == nil ? options.transports : [TransportRegistry.streamName]
  }

  deinit { close() }

  /// Half the processors, so that the host keeps some for its own work; at most four. At least two:
  /// sending and receiving take unequal time, which a single thread per direction cannot balance.
  private static func threadCount(_ options: Options, _ processors: ProcessorSet?) -> Int {
    if options.ioThreads > 0 { return options.ioThreads }
    return min(4, max(2, processors?.count ?? Processors.count / 2))
  }

  private static func processors(_ options: Options) throws(MooncakeError) -> ProcessorSet? {
    guard let text = options.processors else { return nil }
    do throws(ProcessorSet.ParseError) {
      return try ProcessorSet(parsing: text)
    } catch {
      throw MooncakeError(.invalidArgument, "processors: \(error)")
    }
  }

  private static func validate(_ options: Options) throws(MooncakeError) {
    for (index, name) in options.transports.enumerated() {
      _ = try TransportRegistry.kind(named: name)
      if options.transports[..<index].contains(name) {
        throw MooncakeError(.invalidArgument, "transports name '\(name)' twice")
      }
    }
    if options.transports.isEmpty {
      throw MooncakeError(
        .invalidArgument,
        "transports is empty: name "
          + TransportRegistry.names.joined(separator: " or ") + ", or both in order of preference")
    }
    guard (0...64).contains(options.ioThreads), (0...64).contains(options.connectionsPerPeer) else {
      throw MooncakeError(
        .invalidArgument, "threads and connections per peer are at most 64 each")
    }
    guard (0...1_000_000).contains(options.spinMicroseconds) else {
      throw MooncakeError(.invalidArgument, "the spin time is at most 1000000 microseconds")
    }
    if options.defaultTimeoutMilliseconds == 0 {
      throw MooncakeError(.invalidArgument, "the default timeout must not be 0")
    }
  }

  private static func listen(
    _ options: Options, usesService: Bool
  ) throws(MooncakeError) -> OpenedListener {
    switch options.listenRules {
    case .native:
      var listen = ListenOptions()
      listen.bindAddress = options.bindAddress
      listen.advertisedAddress = options.advertisedAddress
      listen.port = options.port
      listen.name = options.name
      listen.usesMetadataService = usesService
      return try ListenAddress.open(listen)
    case .dropIn(var listen):
      listen.usesStore = usesService
      return try ListenAddress.open(listen)
    }
  }

  /// Segment 0 reaches this engine through its own data port, whichever address is advertised.
  var ownDescriptor: SegmentDescriptor {
    var descriptor = local.descriptor
    if let bound = contextBox.withLock({ $0?.address.bound }) {
      descriptor.tcpDataHost = !bound.isAny ? bound.host : bound.isIPv6 ? "::1" : "127.0.0.1"
    }
    return descriptor
  }

  /// Cancels what is in flight, closes every connection and ends the engine's threads. Idempotent;
  /// a second caller waits for the first.
  public func close() {
    closeLock.withLock { isClosed in
      if isClosed { return }
      isClosed = true
      router.close { closeEvent.signal() }
      publisher?.stop()
      rpc.stop()
      caller.stop()
      batches.withEach { $0.requestCancel() }
      workers.stop()
      let end = min(deadline(0), .after(milliseconds: Self.closeMilliseconds))
      var late: String?
      // What is being attached is complete then, and nothing follows.
      let all = attachLock.withLock { _ in transports.all }
      for transport in all { late = transport.stop(until: end) ?? late }
      callbacks.stop()
      releaseMappings(late)
      Log.reportLeftOut()
      let descriptor = engineEvent.exchange(-1, ordering: .acquiringAndReleasing)
      if descriptor >= 0 { _ = FileDescriptor(owning: descriptor) }
    }
  }

  private static let closeMilliseconds: UInt64 = 5_000

  private func releaseMappings(_ late: String?) {
    let memories = mappings.withLock { mappings in
      defer { mappings.removeAll() }
      return Array(mappings.values)
    }
    guard let late else { return }
    // Never unmapped: a late copy would overwrite whatever is mapped there next.
    let kept = KeptMemory(memories)
    let pointer = UInt(bitPattern: Unmanaged.passRetained(kept).toOpaque())
    kept.previous = Self.keptMemory.exchange(pointer, ordering: .acquiringAndReleasing)
    Log.error(
      "destroying an engine: \(late) is in the middle of a copy that does not end and may still "
        + "touch memory that was registered: do not reuse it before that thread has ended")
  }

  /// Memory of closed engines that a peer may still touch. It stays mapped, and referenced so that
  /// leak checkers stay quiet.
  private final class KeptMemory {
    let memories: [EngineMemory]
    var previous: UInt = 0

    init(_ memories: [EngineMemory]) { self.memories = memories }
  }
  private static let keptMemory = Atomic<UInt>(0)

  package var isClosing: Bool { router.isClosing }

  package func checkOpen() throws(MooncakeError) { try router.checkOpen() }

  package var segments: SegmentTable { router.segments }

  /// What moves slices; threads that wait may drive them.
  package var drivers: DriverTable { router.drivers }

  package func deadline(_ timeoutMilliseconds: UInt64) -> Deadline {
    .after(
      milliseconds: timeoutMilliseconds == 0 ? defaultTimeoutMilliseconds : timeoutMilliseconds)
  }

  package var rpcCounters: RPCServer.Counters { rpc.counters }
}

// MARK: - Transports

extension TransferEngine {
  /// Adds a transport while others work: peers are told of it, and open segments get its paths.
  /// Does nothing if the engine has it.
  package func attach(_ name: String) throws(MooncakeError) {
    let kind = try TransportRegistry.kind(named: name)
    if Environment["MC_FORCE_TCP"] != nil, name != TransportRegistry.streamName {
      throw MooncakeError(
        .unsupported, "transport '\(name)' is not attached: MC_FORCE_TCP is set")
    }
    try attachLock.withLock { _ throws(MooncakeError) in
      try checkOpen()
      guard !transports.has(name), let context = contextBox.withLock({ $0 }) else { return }
      let transport: any Transport
      do throws(MooncakeError) {
        transport = try kind.make(context)
        do throws(MooncakeError) { try checkFits(transport) } catch {
          _ = transport.stop(until: .never)
          throw error
        }
      } catch {
        throw MooncakeError(error.code, "transport '\(name)' is not attached: \(error.message)")
      }
      // First, so that it learns of whatever is registered or taken back from here on. Nobody has
      // been told of it before.
      transports.add(transport, cost: kind.cost)
      transport.offer(local.buffers.buffers)
      local.add(Self.describer(of: transport))
    }
    let call = call(until: deadline(0))
    for segment in segments.all where !isClosing { reconnect(segment, until: call.deadline) }
    do throws(MooncakeError) { try publishChanges() } catch {
      throw MooncakeError(
        error.code, "transport '\(name)' is attached, but peers are not told: \(error.message)")
    }
  }
}

extension TransferEngine {
  /// Throws if peers could not read any more what they are told, with a transport's part.
  private func checkFits(_ transport: any Transport) throws(MooncakeError) {
    // A metadata service has limits of its own.
    if publisher == nil { try local.checkFitsMessage(with: [Self.describer(of: transport)]) }
  }
}

extension TransferEngine: RouterHost {
  /// Longest wait for a descriptor that slices wait for.
  private static let refreshMilliseconds: UInt64 = 3_000

  package func refresh(_ segment: OpenSegment, until deadline: Deadline) throws(MooncakeError) {
    try refresh(
      segment, call(until: deadline).within(milliseconds: Self.refreshMilliseconds))
  }

  package func runInBackground(_ body: @escaping @Sendable () -> Void) -> Bool {
    workers.run(body)
  }

  package func run(at deadline: Deadline, _ body: @escaping @Sendable () -> Void) {
    caller.run(at: deadline, body)
  }
}
