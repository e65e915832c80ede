import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import MooncakeTestSupport

/// A real metadata service for a test, with its own loopback ports and folder.
final class ServiceProcess: @unchecked Sendable {
  // Unchecked: used by one test at a time.
  enum Kind: String, CaseIterable, Sendable {
    case ours
    case etcd
    case redis

    var program: String { self == .redis ? "redis-server" : rawValue }

    /// Debian installs both services below /usr.
    var isInstalled: Bool {
      self == .ours
        || ["/usr/bin/", "/usr/local/bin/", "/bin/"].contains { access($0 + program, X_OK) == 0 }
    }

    static var installed: [Kind] { allCases.filter(\.isInstalled) }
  }

  struct StartError: Error { var reason: String }

  let kind: Kind
  private let ports: [UInt16]
  private let folder: String
  private var server: MetadataServer?
  private var process: pid_t = 0

  init(_ kind: Kind) throws {
    self.kind = kind
    var template = Array("/tmp/mooncake-store-XXXXXX".utf8CString)
    guard mkdtemp(&template) != nil else { throw StartError(reason: "mkdtemp: \(errno)") }
    folder = template.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
    ports = try Self.freePorts(2)
    try start()
  }

  deinit {
    kill()
    forget()
    rmdir(folder)
  }

  var uri: String {
    switch kind {
    case .ours: "http://127.0.0.1:\(ports[0])/metadata"
    case .etcd: "etcd://127.0.0.1:\(ports[0])"
    case .redis: "redis://127.0.0.1:\(ports[0])"
    }
  }

  func store() throws -> any MetadataService {
    try MetadataServices.open(MetadataURI(parsing: uri), settings: MetadataSettings())
  }

  func directory(
    cluster: String = "", ttlMilliseconds: UInt64 = 2000
  ) throws -> StoreDirectory {
    StoreDirectory(
      try store(), prefix: MetadataDirectory.prefix(cluster: cluster),
      ttlMilliseconds: ttlMilliseconds)
  }

  func start() throws {
    if kind == .ours {
      var options = MetadataServer.Options()
      options.port = ports[0]
      server = try MetadataServer(options)
      return
    }
    let client = "http://127.0.0.1:\(ports[0])"
    let peer = "http://127.0.0.1:\(ports[1])"
    let arguments =
      kind == .redis
      ? [
        "--bind", "127.0.0.1", "--port", "\(ports[0])", "--save", "", "--appendonly", "no",
        "--dir", folder,
      ]
      : [
        "--data-dir", folder + "/data", "--listen-client-urls", client,
        "--advertise-client-urls", client, "--listen-peer-urls", peer,
        "--initial-advertise-peer-urls", peer, "--initial-cluster", "default=\(peer)",
        "--unsafe-no-fsync", "--log-level", "error",
      ]
    process = try Self.spawn(kind.program, arguments)
    let service = try store()
    let isUp = eventually(within: 20_000) {
      let call = Call(until: .after(milliseconds: 1000))
      return (try? service.list(prefix: "none", from: nil, limit: 1, call)) != nil
    }
    if !isUp { throw StartError(reason: "\(kind.program) does not answer at \(uri)") }
  }

  /// Kills it.
  func kill() {
    server?.stop()
    server = nil
    if process == 0 { return }
    Glibc.kill(process, SIGKILL)
    var status: Int32 = 0
    while waitpid(process, &status, 0) == -1 && errno == EINTR {}
    process = 0
  }

  /// Stops it without ending it.
  func freeze() { if process != 0 { Glibc.kill(process, SIGSTOP) } }

  func thaw() { if process != 0 { Glibc.kill(process, SIGCONT) } }

  /// Loses all data and comes back.
  func restartEmpty() throws {
    kill()
    forget()
    try start()
  }

  private func forget() {
    guard let process = try? Self.spawn("rm", ["-rf", folder + "/data"]) else { return }
    var status: Int32 = 0
    while waitpid(process, &status, 0) == -1 && errno == EINTR {}
  }

  private static func spawn(_ program: String, _ arguments: [String]) throws -> pid_t {
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    for descriptor in [0, 1, 2] as [Int32] {
      posix_spawn_file_actions_addopen(&actions, descriptor, "/dev/null", O_RDWR, 0)
    }
    var argv = ([program] + arguments).map { strdup($0) } + [nil]
    defer { for argument in argv { free(argument) } }
    var process = pid_t()
    let result = posix_spawnp(&process, program, &actions, nil, &argv, Glibc.environ)
    if result != 0 { throw StartError(reason: "\(program): \(Errno(result))") }
    return process
  }

  /// Ports that were free a moment ago.
  private static func freePorts(_ count: Int) throws -> [UInt16] {
    let first = try Socket.listening(on: SocketAddress(numeric: "127.0.0.1", port: 0)!)
    let second = try Socket.listening(on: SocketAddress(numeric: "127.0.0.1", port: 0)!)
    return [try first.localAddress().port, try second.localAddress().port]
  }
}

/// A call that a test makes: ten seconds.
var testCall: Call { Call(until: .after(milliseconds: 10_000)) }

/// A record of a payload of 100 bytes whose version is a number.
func testRecord(
  _ name: String, version: UInt64 = 1, holding: UInt64 = .random(in: 1 ... .max),
  isOrigin: Bool = true, isComplete: Bool = true, published: UInt64? = nil
) -> HolderRecord {
  HolderRecord(
    PayloadSummary(
      name: name, version: PayloadVersion(high: 7, low: version), size: 100, shardBytes: 64,
      shardCount: 2, bufferCount: 1, publishedMilliseconds: published ?? version,
      isWritable: false),
    holder: HolderAddress(holding: holding, rpc: "10.0.0.1:7", segment: "node-\(holding)"),
    isOrigin: isOrigin, isComplete: isComplete)
}

/// The code of the error that `body` throws.
func code(_ body: () throws -> Void) -> MooncakeError.Code? {
  do { try body() } catch { return (error as? MooncakeError)?.code }
  return nil
}
