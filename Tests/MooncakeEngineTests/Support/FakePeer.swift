import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization

/// A peer with a real RPC daemon and a data port that does what a test says: a thread per
/// connection runs the script.
final class FakePeer: @unchecked Sendable {
  // Unchecked: the acceptor is written once before the object is shared.
  typealias Script = @Sendable (FakeConnection) -> Void

  /// The address registered according to the descriptor. There is no memory.
  static let bufferAddress: UInt64 = 0x10_0000
  static let bufferLength: UInt64 = 64 << 20

  let name: String
  private let rpc: RPCServer
  private let listener: Socket
  private let publishedVersion: Box<Int>
  private let state = Lock(State())
  private let wakeup: EventFD
  private var acceptor: WorkerThread?
  private let script: Script

  private struct State {
    var threads: [WorkerThread] = []
    var connections: [FakeConnection] = []
    var isStopping = false
  }

  /// `version` is the framing that the descriptor offers, 0 to leave the field out.
  init(version: Int = 2, script: @escaping Script) throws {
    self.script = script
    wakeup = try EventFD()
    listener = try makeListener()
    let rpcListener = try makeListener()
    let name = try rpcListener.localAddress().description
    let port = try listener.localAddress().port
    let publishedVersion = Box(version)
    self.name = name
    self.publishedVersion = publishedVersion
    rpc = try RPCServer(
      listener: rpcListener,
      handlers: .init(
        descriptor: { Self.descriptor(name, port, publishedVersion.value) }, notify: { _ in nil }))
    acceptor = try WorkerThread.start(name: "fake") { [unowned self] in accept() }
  }

  deinit { stop() }

  /// How many connections have been made.
  var connectionCount: Int { state.withLock { $0.connections.count } }

  /// Offers another framing from now on.
  func publish(version: Int) { publishedVersion.value = version }

  /// The connection with this number, once it is made.
  func connection(_ index: Int) -> FakeConnection? {
    _ = eventually { connectionCount > index }
    return state.withLock { index < $0.connections.count ? $0.connections[index] : nil }
  }

  func stop() {
    guard let acceptor else { return }
    state.withLock { $0.isStopping = true }
    wakeup.signal()
    acceptor.join()
    self.acceptor = nil
    rpc.stop()
    let (threads, connections) = state.withLock { ($0.threads, $0.connections) }
    for connection in connections { connection.finish() }
    for thread in threads { thread.join() }
  }

  private func accept() {
    while !state.withLock({ $0.isStopping }) {
      var items = [
        pollfd(fd: listener.rawValue, events: Int16(POLLIN), revents: 0),
        pollfd(fd: wakeup.descriptor.rawValue, events: Int16(POLLIN), revents: 0),
      ]
      _ = poll(&items, 2, -1)
      guard let socket = try? listener.accept() else { continue }
      let index = connectionCount
      let connection = FakeConnection(socket, index: index)
      guard
        let thread = try? WorkerThread.start(
          name: "fake-conn",
          { [script] in
            script(connection)
            connection.finish()
          })
      else { continue }
      state.withLock {
        $0.threads.append(thread)
        $0.connections.append(connection)
      }
    }
  }

  private static func descriptor(_ name: String, _ port: UInt16, _ version: Int) -> String {
    let field = version == 0 ? "" : #""tcp_proto_version":\#(version),"#
    return #"{"name":"\#(name)","protocol":"tcp","tcp_data_host":"127.0.0.1","#
      + #""tcp_data_port":\#(port),\#(field)"buffers":[{"name":"\#(name)","#
      + #""addr":\#(bufferAddress),"length":\#(bufferLength)}]}"#
  }
}

/// What a data connection of a fake peer says and hears.
extension FakeConnection {
  /// The next request; nil at the end of the stream.
  func header() -> TCPWire.Header? {
    guard let bytes = receive(TCPWire.headerBytes) else { return nil }
    return bytes.withUnsafeBytes { TCPWire.Header($0.baseAddress!) }
  }

  func sendStatus(_ word: UInt64 = TCPWire.statusOK) { send(Self.frame(word)) }

  /// Answers like a correct target, reads with `byte`; false at the end of the stream.
  func serveOne(reading byte: UInt8 = 0x77, framed: Bool = true) -> Bool {
    guard let header = header() else { return false }
    let count = Int(header.size)
    if header.opcode == .write {
      guard receive(count) != nil else { return false }
      if framed { sendStatus() }
    } else {
      if framed { sendStatus() }
      send([UInt8](repeating: byte, count: count))
    }
    return true
  }

  static func frame(_ word: UInt64) -> [UInt8] {
    withUnsafeBytes(of: word.littleEndian) { Array($0) }
  }
}
