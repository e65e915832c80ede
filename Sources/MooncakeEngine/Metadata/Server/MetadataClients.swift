import Glibc
import MooncakeSystem

/// The door of a metadata server: accepts connections, hands them to libmicrohttpd, and closes
/// those that take too long or that others need the place of. Belongs to the server's thread.
final class MetadataClients {
  private let library: MicroHTTPLibrary
  private let daemon: OpaquePointer
  private let limits: MetadataLimits
  private var listener: Socket?
  private var connections: MetadataConnections
  /// What is being handed over.
  private var arriving: (socket: Int32, group: String)?
  /// When accepting goes on; nil while it does.
  private var pauseEnd: UInt64?

  static let listenerToken: UInt64 = 2
  /// Connections of the daemon that are closing, beside the others.
  static let closingCount = 512
  private static let acceptsPerTurn = 256
  private static let pauseNanoseconds: UInt64 = 100_000_000
  /// Who takes longer than this may have to give way to others.
  private static let graceNanoseconds: UInt64 = 1_000_000_000

  init(
    _ library: MicroHTTPLibrary, _ daemon: OpaquePointer, listener: consuming Socket,
    limits: MetadataLimits
  ) {
    self.library = library
    self.daemon = daemon
    self.limits = limits
    self.listener = consume listener
    connections = MetadataConnections(
      limit: limits.connectionCount, groupLimit: limits.connectionsPerHost,
      patienceMilliseconds: limits.requestMilliseconds)
  }

  func listen(_ epoll: borrowing Epoll) throws(Errno) {
    guard let descriptor = listener?.rawValue else { return }
    try epoll.add(descriptor, events: Epoll.readable, token: Self.listenerToken)
  }

  /// Closes the listener; connections are the daemon's.
  func stop() { listener = nil }

  /// When to call `tend`, in nanoseconds on `Clock`.
  var nextTime: UInt64 { min(pauseEnd ?? .max, connections.nextCheck) }

  /// Does what is due without a request.
  func tend(_ epoll: borrowing Epoll, now: UInt64) {
    for key in connections.overdue(now: now) { expire(key) }
    guard let end = pauseEnd, now >= end else { return }
    pauseEnd = nil
    do throws(Errno) { try listen(epoll) } catch { pauseEnd = now &+ Self.pauseNanoseconds }
  }

  // MARK: Accepting

  /// Takes in who waits, up to a number, so that the others are served in between.
  func accept(_ epoll: borrowing Epoll) {
    var hasMadeRoom = false
    var count = 0
    while count < Self.acceptsPerTurn {
      if connections.isFull {
        pause(epoll, "all \(limits.connectionCount) connections wait for changes")
        return
      }
      do throws(Errno) {
        guard let socket = try listener?.accept() else { return }
        adopt(socket)
        count += 1
        hasMadeRoom = false
      } catch {
        if error == .tooManyOpenFiles, !hasMadeRoom, let key = connections.stalest({ _ in true }) {
          close(key)
          // It closes what is shut down.
          _ = library.run(daemon)
          hasMadeRoom = true
          continue
        }
        pause(epoll, "\(error)")
        return
      }
    }
  }

  /// Who waits would make epoll return at once again and again, so the listener rests.
  private func pause(_ epoll: borrowing Epoll, _ cause: String) {
    Log.warning(
      "metadata server: it accepts no connections for the moment: \(cause): clients wait; if this "
        + "goes on, raise the limit of the process (ulimit -n), or use fewer clients")
    if let descriptor = listener?.rawValue { epoll.remove(descriptor) }
    pauseEnd = Clock.now() &+ Self.pauseNanoseconds
  }

  private func adopt(_ socket: consuming Socket) {
    // Who has gone already has no address.
    guard let address = try? socket.peerAddress() else { return }
    let group = address.networkOrHost
    switch connections.verdict(group: group) {
    case .welcome: break
    case .instead(let key):
      Log.warning(
        "metadata server: \(connections.count) connections, too many for one more from \(group): "
          + "closing the one that is silent longest, from \(connections[key]?.group ?? "")",
        about: connections[key]?.group ?? "")
      close(key)
    case .refused, .full:
      Log.warning(
        "metadata server: refused a connection from \(group), which has "
          + "\(limits.connectionsPerHost) already: one address may have no more", about: group)
      refuse(socket)
      return
    }
    let descriptor = socket.release()
    arriving = (descriptor, group)
    defer { arriving = nil }
    // It closes the socket if it does not take it.
    _ = address.withPointer { library.add(daemon, descriptor, $0, $1) }
  }

  private func refuse(_ socket: borrowing Socket) {
    let text = "this address has too many connections\n"
    let answer = Array(
      ("HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n"
        + "Content-Type: text/plain; charset=utf-8\r\nContent-Length: \(text.utf8.count)\r\n\r\n"
        + text).utf8)
    // A few bytes always fit into a new connection.
    _ = try? socket.trySend(answer, from: 0)
  }

  // MARK: Connections

  private func key(_ connection: OpaquePointer) -> MetadataConnections.Key {
    UInt(bitPattern: connection)
  }

  /// The daemon has taken a connection, or is about to close its socket.
  func changed(_ connection: OpaquePointer, isStart: Bool) {
    if !isStart { return connections.remove(key(connection)) }
    guard let arriving else { return }
    connections.add(
      key(connection), socket: arriving.socket, group: arriving.group, now: Clock.now())
  }

  func enter(_ phase: MetadataConnections.Phase, _ connection: OpaquePointer) {
    connections.enter(phase, key(connection), now: Clock.now())
  }

  /// Closes who has been in a phase for longest, if that is long.
  func closeStalest(in phase: MetadataConnections.Phase) {
    let now = Clock.now()
    let key = connections.stalest { connection in
      connection.phase == phase && now >= connection.since &+ Self.graceNanoseconds
    }
    guard let key else { return }
    Log.warning(
      "metadata server: closing the slowest connection, from \(connections[key]?.group ?? ""): "
        + "others need the memory that it holds", about: connections[key]?.group ?? "")
    close(key)
  }

  private func expire(_ key: MetadataConnections.Key) {
    guard let connection = connections[key] else { return }
    if !connection.isIdle {
      Log.warning(
        "metadata server: \(connection.group) "
          + (connection.phase == .answer ? "took no whole answer" : "sent no whole request")
          + " in \(limits.requestMilliseconds) ms: connection closed", about: connection.group)
    }
    close(key)
  }

  /// The daemon sees the end of the stream at its next turn.
  private func close(_ key: MetadataConnections.Key) {
    guard let connection = connections[key] else { return }
    connections.startClosing(key)
    _ = shutdown(connection.socket, Int32(SHUT_RDWR))
  }
}
