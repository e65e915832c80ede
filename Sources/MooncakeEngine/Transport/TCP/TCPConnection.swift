import CLinux
import Glibc
import MooncakeSystem
import Synchronization

/// The socket of an endpoint and its life: idle, connecting, connected, and after a failure resting
/// until the next attempt. Driver only.
struct TCPConnection: ~Copyable {
  enum State {
    case idle
    case connecting(until: UInt64)
    case connected
    /// Waits before the next attempt.
    case resting(until: UInt64)
  }

  private(set) var state = State.idle
  /// The socket's descriptor while there is one, else -1.
  private(set) var descriptor: Int32 = -1
  /// Whether epoll tells when the socket takes bytes again.
  private(set) var isWatchedForRoom = false
  private var socket: Socket?
  private var token: UInt64 = 0
  /// When the first of the failures in a row was; 0 without one.
  private var failingSince: UInt64 = 0
  private var restNanoseconds: UInt64 = 0
  private var lastUse: UInt64 = 0

  static let connectLimitNanoseconds: UInt64 = 5_000_000_000
  /// How long a peer that refuses or drops connections is tried before its transfers fail.
  private static let failureLimitNanoseconds: UInt64 = 3_000_000_000
  private static let firstRestNanoseconds: UInt64 = 5_000_000
  private static let restLimitNanoseconds: UInt64 = 500_000_000
  /// A connection unused for longer is probed before its next request.
  private static let probeNanoseconds: UInt64 = 1_000_000
  /// Deadlines decide how long a peer is waited for, not the kernel: a connection that it gives up
  /// leaves open what becomes of the writes on it.
  private static let kernelLimitMilliseconds: Int32 = 24 * 3600 * 1000

  var isConnected: Bool {
    if case .connected = state { return true }
    return false
  }

  // MARK: Connecting

  /// Begins to connect; epoll tells the end.
  mutating func start(to address: SocketAddress, for endpoint: TCPEndpoint) throws(Errno) {
    assert(descriptor < 0, "a second socket for one endpoint")
    let socket = try Socket(family: address.family)
    socket.setNoDelay()
    if address.isLoopback { socket.setLocal(bufferBytes: TCPWire.localSocketBufferBytes) }
    socket.setPatience(milliseconds: Self.kernelLimitMilliseconds)
    try socket.startConnect(to: address)
    token = try endpoint.loop.watch(
      socket.rawValue, events: Epoll.writable | Epoll.readable, for: endpoint)
    isWatchedForRoom = true
    descriptor = socket.rawValue
    self.socket = consume socket
    state = .connecting(until: Clock.now() &+ Self.connectLimitNanoseconds)
  }

  /// Finds out how connecting has ended; false if it has not.
  mutating func finishConnecting(_ loop: TCPClientLoop) throws(Errno) -> Bool {
    guard case .connecting = state else {
      assertionFailure("not connecting")
      return false
    }
    if let error = socket?.takeError() { throw error }
    let remote: SocketAddress?
    do throws(Errno) { remote = try socket?.peerAddress() } catch {
      // Without a peer it is still in progress: a spurious wake-up.
      if error.rawValue == ENOTCONN { return false }
      throw error
    }
    // A port of the ephemeral range that nobody listens on can connect to itself.
    if remote == (try? socket?.localAddress()) { throw .connectionRefused }
    state = .connected
    failingSince = 0
    restNanoseconds = 0
    noteUse()
    loop.counters.clientConnections.wrappingAdd(1, ordering: .relaxed)
    return true
  }

  // MARK: Ending

  /// Takes the socket out of use; it is closed with the result.
  mutating func takeSocket(_ loop: TCPClientLoop) -> Socket? {
    guard let socket = socket.take() else { return nil }
    loop.unwatch(socket.rawValue, token: token)
    if isConnected { loop.counters.clientConnections.wrappingSubtract(1, ordering: .relaxed) }
    state = .idle
    descriptor = -1
    isWatchedForRoom = false
    return socket
  }

  /// Waits before the next attempt; returns whether the peer has failed for too long.
  mutating func rest() -> Bool {
    assert(descriptor < 0, "resting with a socket")
    let now = Clock.now()
    if failingSince == 0 { failingSince = now }
    restNanoseconds = min(
      max(restNanoseconds * 2, Self.firstRestNanoseconds), Self.restLimitNanoseconds)
    state = .resting(until: now + restNanoseconds)
    return Clock.elapsed(since: failingSince, until: now) >= Self.failureLimitNanoseconds
  }

  /// Nobody waits for the peer any more: the next failure is the first of its row.
  mutating func forgetFailures() { failingSince = 0 }

  /// The next attempt need not wait.
  mutating func endRest() {
    assert(descriptor < 0, "idle with a socket")
    state = .idle
  }

  // MARK: In use

  /// Has epoll tell when the socket takes bytes again, or stops that.
  @inline(__always)
  mutating func watchForRoom(_ isWanted: Bool, _ loop: TCPClientLoop) {
    if isWatchedForRoom == isWanted { return }
    isWatchedForRoom = isWanted
    loop.rewatch(
      descriptor, events: Epoll.readable | (isWanted ? Epoll.writable : 0), token: token)
  }

  mutating func noteUse() { lastUse = Clock.now() }

  /// Whether a connection without requests has something to read: its end, or bytes that nobody
  /// asked for. One that was just used is not asked.
  var isStale: Bool {
    if Clock.elapsed(since: lastUse) < Self.probeNanoseconds { return false }
    var byte: UInt8 = 0
    let count = recv(descriptor, &byte, 1, Int32(MSG_PEEK) | Int32(MSG_DONTWAIT))
    return count >= 0 || errno != EAGAIN
  }

  /// Ends this side's stream.
  func shutdownWrite() { _ = shutdown(descriptor, Int32(SHUT_WR)) }

  /// Whether the peer's kernel has acknowledged all data that was sent. A peer that closes with
  /// some of it unread resets the connection, and what comes after a close is never acknowledged:
  /// so before an orderly end of the stream this means that the peer has read it. The end of this
  /// side's stream counts as a byte.
  var hasPeerReadEverything: Bool {
    var unacknowledged: Int32 = 0
    return ioctl(descriptor, UInt(TIOCOUTQ), &unacknowledged) == 0 && unacknowledged <= 1
  }
}
