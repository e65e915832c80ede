import Glibc
import MooncakeSystem

/// Tests whether a port accepts a connection, and closes it again.
enum ConnectTest {
  static func connect(to address: SocketAddress, deadline: Deadline) throws(Errno) {
    let socket = try Socket(family: address.family)
    try socket.startConnect(to: address)
    var descriptor = pollfd(fd: socket.rawValue, events: Int16(POLLOUT), revents: 0)
    while true {
      let count = poll(&descriptor, 1, deadline.remainingMilliseconds)
      if count > 0 { break }
      if count < 0 && Errno.current != .interrupted { throw Errno.current }
      if deadline.hasPassed { throw .timedOut }
    }
    if let error = socket.takeError() { throw error }
  }
}
