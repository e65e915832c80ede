import Glibc
import MooncakeSystem

/// Refused connections, kept open for a moment after the answer. Closing a socket with unread bytes
/// resets it, and the client could lose the answer.
struct MetadataFarewells: ~Copyable {
  private var waiting: [(socket: Int32, end: UInt64)] = []
  private static let countLimit = 64
  private static let patienceNanoseconds: UInt64 = 1_000_000_000
  private static let tickNanoseconds: UInt64 = 20_000_000
  private static let turnBytes = 256 << 10

  deinit { for each in waiting { _ = close(each.socket) } }

  /// When to call `tend`, in nanoseconds on `Clock`.
  func nextTime(now: UInt64) -> UInt64 { waiting.isEmpty ? .max : now &+ Self.tickNanoseconds }

  /// Takes over a socket whose answer has been written.
  mutating func add(_ socket: consuming Socket, now: UInt64) {
    if waiting.count >= Self.countLimit { _ = close(waiting.removeFirst().socket) }
    socket.shutdownWrite()
    waiting.append((socket.release(), now &+ Self.patienceNanoseconds))
  }

  /// Discards what arrives, and closes sockets whose client has gone or whose time is over.
  mutating func tend(now: UInt64) {
    if waiting.isEmpty { return }
    withUnsafeTemporaryAllocation(byteCount: 16 << 10, alignment: 1) { chunk in
      waiting.removeAll { each in
        if now < each.end && !Self.hasEnded(each.socket, chunk) { return false }
        _ = close(each.socket)
        return true
      }
    }
  }

  private static func hasEnded(_ socket: Int32, _ chunk: UnsafeMutableRawBufferPointer) -> Bool {
    var left = turnBytes
    while left > 0 {
      let count = recv(socket, chunk.baseAddress, chunk.count, Int32(MSG_DONTWAIT))
      if count == 0 { return true }
      if count < 0 { return Errno.current.rawValue != EAGAIN && Errno.current != .interrupted }
      left -= count
    }
    return false
  }
}
