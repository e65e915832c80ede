import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem

/// A connection that was given up with unanswered writes on it.
///
/// This side has ended its stream and discards what still arrives, because a peer that is blocked
/// on sending an answer never gets to the end of its input. Servers of every release read in order,
/// store straight into place, and close at the end of the input or of the process. So the peer's
/// end of stream, or a reset that was received, means that nothing of the connection can land any
/// more. Driver only.
final class TCPFence {
  enum Progress {
    case open
    /// The peer has closed the connection.
    case closed
    /// The kernel gave it up; the peer may still store data from it.
    case lost(Errno)
  }

  let descriptor: Int32
  let token: UInt64
  /// When writes stop waiting for it.
  let expiry: UInt64
  /// Whether writes have stopped waiting for it.
  private(set) var isOverdue = false
  private let socket: Socket
  private let gate: WriteGate
  private let entry: UInt64
  private let peerDescription: String

  /// How long writes wait for the peer to close.
  static let waitLimitNanoseconds: UInt64 = 10_000_000_000
  /// Kernels since 6.15 retransmit at least this often, so that the end of an outage is noticed.
  private static let retryLimitMilliseconds: Int32 = 2000
  private static let longestRetryOption: Int32 = 44
  /// Bytes discarded before other connections are served.
  private static let turnLimitBytes = 4 << 20

  init(
    _ socket: consuming Socket, token: UInt64, expiry: UInt64, peer: TCPPeer,
    unanswered: [Range<UInt64>]
  ) {
    socket.shutdownWrite()
    try? socket.set(Int32(IPPROTO_TCP), Self.longestRetryOption, Self.retryLimitMilliseconds)
    // A host that vanished while no data was under way is only noticed by probing.
    socket.keepAlive(idleSeconds: 60)
    descriptor = socket.rawValue
    self.socket = socket
    self.token = token
    self.expiry = expiry
    gate = peer.gate
    peerDescription = peer.description
    entry = peer.gate.add(unanswered, isOverdue: false)
  }

  /// Discards what has arrived.
  func progress(_ scratch: UnsafeMutableRawPointer, _ byteCount: Int) -> Progress {
    var left = Self.turnLimitBytes
    while left > 0 {
      let count = recv(descriptor, scratch, byteCount, 0)
      if count == 0 { return .closed }
      if count > 0 {
        left -= count
        continue
      }
      let error = Errno.current
      switch error.rawValue {
      case EINTR: continue
      case EAGAIN: return .open
      case ECONNRESET, EPIPE: return .closed
      default: return .lost(error)
      }
    }
    return .open
  }

  /// Lets writes to the ranges continue.
  func lift() { gate.remove(entry) }

  /// Makes writes to the ranges fail instead of waiting.
  func giveUp(_ reason: String) {
    if isOverdue { return }
    isOverdue = true
    Log.warning(
      "\(peerDescription): a connection with unanswered writes was given up and \(reason); "
        + "writes to the same memory fail until the peer closes it or restarts",
      about: peerDescription)
    gate.markOverdue(entry)
  }
}
