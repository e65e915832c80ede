import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport

/// A raw connection for speaking the RPC wire badly.
struct RPCTestPeer: ~Copyable {
  let socket: Socket

  init(to address: SocketAddress) throws { socket = try .connected(to: address) }

  func send(_ bytes: [UInt8]) throws { try socket.sendAll(bytes) }

  /// Everything up to the end of the stream; a reset counts as the end.
  func receiveAll(within milliseconds: UInt64 = 5000) throws -> [UInt8] {
    let deadline = Deadline.after(milliseconds: milliseconds)
    var bytes: [UInt8] = []
    let chunk = UnsafeMutableRawBufferPointer.allocate(byteCount: 65_536, alignment: 1)
    defer { chunk.deallocate() }
    while true {
      do throws(Errno) {
        guard let count = try socket.tryReceive(into: chunk) else {
          try socket.wait(for: POLLIN, until: deadline)
          continue
        }
        if count == 0 { return bytes }
        bytes.append(contentsOf: chunk[..<count])
      } catch {
        if error.rawValue == ECONNRESET { return bytes }
        throw error
      }
    }
  }

  /// Sends a request and returns the text of the answer, type byte and length removed.
  func ask(_ bytes: [UInt8]) throws -> String {
    try send(bytes)
    let answer = try receiveAll()
    return String(decoding: answer.dropFirst(9), as: UTF8.self)
  }
}

/// The server's address as a client names it.
extension RPCServer {
  var name: String { address.description }
  var hostPort: HostPort { HostPort(host: address.host, port: address.port) }
}

func makeServer(
  host: String = "127.0.0.1", queue: NotificationQueue = NotificationQueue(),
  descriptor: String? = SegmentDescriptor(name: "peer:1").json(),
  change: (inout RPCServer.Limits) -> Void = { _ in }
) throws -> RPCServer {
  var limits = RPCServer.Limits(messageLength: 1 << 20)
  change(&limits)
  return try RPCServer(
    listener: makeListener(host),
    handlers: RPCServer.Handlers(descriptor: { descriptor }, notify: { queue.append($0) }),
    limits: limits)
}
