import CLinux
import Glibc
import MooncakeSystem

/// A connection of a server that a test plays, with blocking calls that end with `finish`.
package final class FakeConnection: Sendable {
  package let index: Int
  private let socket: Socket

  package init(_ socket: consuming Socket, index: Int) {
    self.socket = socket
    self.index = index
  }

  /// Whether more bytes arrive in the time.
  package func hasMore(within milliseconds: Int32) -> Bool {
    var item = pollfd(fd: socket.rawValue, events: Int16(POLLIN), revents: 0)
    return poll(&item, 1, milliseconds) > 0
  }

  /// Exactly `count` bytes; nil when the stream ends before.
  package func receive(_ count: Int) -> [UInt8]? {
    var bytes = [UInt8](repeating: 0, count: count)
    var done = 0
    while done < count {
      let part = bytes.withUnsafeMutableBytes { bytes in
        recv(socket.rawValue, bytes.baseAddress! + done, count - done, 0)
      }
      if part > 0 {
        done += part
      } else if part < 0 && (errno == EAGAIN || errno == EINTR) {
        try? socket.wait(for: POLLIN, until: .never)
      } else {
        return nil
      }
    }
    return bytes
  }

  /// Sends everything unless the connection breaks.
  package func send(_ bytes: [UInt8]) {
    var done = 0
    while done < bytes.count {
      do throws(Errno) {
        if let part = try socket.trySend(bytes, from: done) {
          done += part
        } else {
          try socket.wait(for: POLLOUT, until: .never)
        }
      } catch {
        return
      }
    }
  }

  /// Waits until the other end has closed the connection.
  package func awaitClose() { while receive(65_536) != nil {} }

  /// Closes both directions; the descriptor goes with the object.
  package func finish() { _ = shutdown(socket.rawValue, Int32(SHUT_RDWR)) }

  /// Ends the connection as a process does that dies with input unread.
  package func reset() {
    socket.resetOnClose()
    // A connect to nowhere is the one way to reset without giving the descriptor back.
    var address = sockaddr(
      sa_family: sa_family_t(AF_UNSPEC), sa_data: (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    _ = connect(socket.rawValue, &address, socklen_t(MemoryLayout<sockaddr>.size))
  }
}
