import Glibc
import MooncakeSystem

/// Connections that were refused: each has its answer and is open for a moment longer. Closing a
/// socket with bytes that nobody has read resets it, and the client might lose the answer.
struct MetadataFarewells: ~Copyable {
  private var waiting: [(socket: Int32, end: UInt64)] = []
  private static let countLimit = 64
  private static let patienceNanoseconds: UInt64 = 1_000_000_000
  private static let tickNanoseconds: UInt64 = 20_000_000
  private static let turnBytes = 256 << 10

  deinit { for each in waiting { _ = close(each.socket) } }

  /// When to call `tend`, in nanoseconds on `Clock`.
  func nextTime(now: UInt64) -> UInt64 { waiting.isEmpty ? .max : now &+ Self.tickNanoseconds }

  /// Takes a socket over whose answer is written.
  mutating func add(_ socket: consuming Socket, now: UInt64) {
    if waiting.count >= Self.countLimit { _ = close(waiting.removeFirst().socket) }
    socket.shutdownWrite()
    waiting.append((socket.release(), now &+ Self.patienceNanoseconds))
  }

  /// Reads what comes, and closes those whose client has gone or has had its time.
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
