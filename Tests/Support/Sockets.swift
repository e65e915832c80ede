import Glibc
import MooncakeSystem

/// Raw sockets for tests, with bounded waits.
extension Socket {
  private static let patienceMilliseconds: UInt64 = 5000

  /// Connects to an address, from one of this host's if that is given.
  package static func connected(
    to target: SocketAddress, from source: SocketAddress? = nil
  ) throws -> Socket {
    let socket = try Socket(family: target.family)
    if let source, source.withPointer({ bind(socket.rawValue, $0, $1) }) != 0 {
      throw Errno.current
    }
    try socket.startConnect(to: target)
    try socket.wait(for: POLLOUT, until: .after(milliseconds: patienceMilliseconds))
    if let error = socket.takeError() { throw error }
    return socket
  }

  package func sendAll(_ bytes: [UInt8]) throws {
    var sent = 0
    while sent < bytes.count {
      if let count = try trySend(bytes, from: sent) {
        sent += count
      } else {
        try wait(for: POLLOUT, until: .after(milliseconds: Self.patienceMilliseconds))
      }
    }
  }
}

/// Listens on a free port.
package func makeListener(_ host: String = "127.0.0.1") throws -> Socket {
  try Socket.listening(on: SocketAddress(numeric: host, port: 0)!)
}

/// Open descriptors of this process.
package func openDescriptorCount() -> Int {
  guard let directory = opendir("/proc/self/fd") else { return -1 }
  defer { closedir(directory) }
  var count = 0
  while readdir(directory) != nil { count += 1 }
  return count
}
