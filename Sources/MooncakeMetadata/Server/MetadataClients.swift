import Glibc
import MooncakeBase
import MooncakeSystem

/// Manages a metadata server's connections: accepts them, hands them to libmicrohttpd, and closes
/// those that are too slow or whose place others need. Used only by the server's thread.
final class MetadataClients {
  private let library: MicroHTTPLibrary
  private let daemon: OpaquePointer
  private let limits: MetadataLimits
  private var listener: Socket?
  private var connections: MetadataConnections
  /// The connection being handed to libmicrohttpd.
  private var arriving: (socket: Int32, group: String)?
  /// When to accept again; nil while accepting.
  private var pauseEnd: UInt64?
  /// When the first connection arrived that the daemon has not read from yet.
  private var unheardSince: UInt64?
  private var farewells = MetadataFarewells()
  /// Answers a connection's wait for changes at once; false if it has none.
  var endWatch: (MetadataConnections.Key) -> Bool = { _ in false }

  static let listenerToken: UInt64 = 2
  /// Room in the daemon for connections that are closing, beyond the open ones.
  static let closingCount = 512
  private static let acceptsPerTurn = 256
  private static let pauseNanoseconds: UInt64 = 100_000_000

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
      patienceMilliseconds: limits.requestMilliseconds,
      graceMilliseconds: limits.graceMilliseconds)
  }

  func listen(_ epoll: borrowing Epoll) throws(Errno) {
    guard let descriptor = listener?.rawValue else { return }
    try epoll.add(descriptor, events: Epoll.readable, token: Self.listenerToken)
  }

  /// Closes the listener; the daemon owns the connections.
  func stop() { listener = nil }

  /// When to call `tend`, in nanoseconds on `Clock`.
  var nextTime: UInt64 {
    min(pauseEnd ?? .max, connections.nextCheck, farewells.nextTime(now: Clock.now()))
  }

  var isEmpty: Bool { connections.isEmpty }

  /// Does timed work: closes overdue connections and resumes accepting.
  func tend(_ epoll: borrowing Epoll, now: UInt64) {
    farewells.tend(now: now)
    for key in connections.overdue(now: now) { expire(key) }
    guard let end = pauseEnd, now >= end else { return }
    pauseEnd = nil
    do throws(Errno) { try listen(epoll) } catch { pauseEnd = now &+ Self.pauseNanoseconds }
  }

  // MARK: Accepting

  /// Accepts waiting connections, up to a limit so that others are served in between. Returns
  /// whether there may be more.
  func accept(_ epoll: borrowing Epoll) -> Bool {
    if pauseEnd != nil { return false }
    unheardSince = nil
    var hasMadeRoom = false
    var count = 0
    while count < Self.acceptsPerTurn {
      if connections.isFull {
        if !isAnybodyWaiting { return false }
        if !endLongestWatch(group: nil) {
          pause(epoll, "all \(limits.connectionCount) connections are at work")
          return false
        }
      }
      do throws(Errno) {
        guard let socket = try listener?.accept() else { return false }
        adopt(socket)
        count += 1
        hasMadeRoom = false
      } catch {
        if error == .tooManyOpenFiles, !hasMadeRoom,
          let key = connections.stalest(now: Clock.now())
        {
          close(key)
          // The daemon closes sockets that have been shut down.
          _ = library.run(daemon)
          hasMadeRoom = true
          continue
        }
        pause(epoll, "\(error)")
        return false
      }
    }
    return true
  }

  private var isAnybodyWaiting: Bool {
    guard let descriptor = listener?.rawValue else { return false }
    var entry = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
    return poll(&entry, 1, 0) == 1
  }

  /// Ends the longest wait for changes, so that its connection becomes idle and may be closed.
  private func endLongestWatch(group: String?) -> Bool {
    guard let key = connections.longestWatch(group: group, now: Clock.now()), endWatch(key) else {
      return false
    }
    Log.warning(
      "metadata server: \(connections.count) connections, and all of them wait for changes: "
        + "answering one early, from \(connections.group(of: key)), to make room: use fewer "
        + "clients that watch", about: connections.group(of: key))
    return true
  }

  /// A waiting client would make epoll return at once, again and again, so stop listening for a
  /// while.
  private func pause(_ epoll: borrowing Epoll, _ cause: String) {
    Log.warning(
      "metadata server: it accepts no connections for the moment: \(cause): clients wait; if this "
        + "goes on, raise the limit of the process (ulimit -n), or use fewer clients")
    if let descriptor = listener?.rawValue { epoll.remove(descriptor) }
    pauseEnd = Clock.now() &+ Self.pauseNanoseconds
  }

  private func adopt(_ socket: consuming Socket) {
    // A client that has gone has no address.
    guard let address = try? socket.peerAddress() else { return }
    let group = address.networkOrHost
    switch verdict(group: group) {
    case .welcome: break
    case .instead(let key):
      let other = connections.group(of: key)
      Log.warning(
        "metadata server: \(connections.count) connections, too many for one more from \(group): "
          + "closing the one that is silent longest, from \(other)", about: other)
      close(key)
    case .refused, .full:
      Log.warning(
        "metadata server: refused a connection from \(group), which has "
          + "\(limits.connectionsPerHost) already: one address may have no more", about: group)
      refuse(socket)
      return
    }
    if unheardSince == nil { unheardSince = Clock.now() }
    let descriptor = socket.release()
    arriving = (descriptor, group)
    defer { arriving = nil }
    // On failure the daemon closes the socket.
    _ = address.withPointer { library.add(daemon, descriptor, $0, $1) }
  }

  private func verdict(group: String) -> MetadataConnections.Verdict {
    let verdict = connections.verdict(group: group, now: Clock.now())
    switch verdict {
    case .welcome: return verdict
    case .instead(let key):
      // Close no connection before the daemon has looked for a request on it.
      guard let start = unheardSince, let since = connections[key]?.since, since >= start else {
        return verdict
      }
      _ = library.run(daemon)
      unheardSince = nil
    case .refused: if !endLongestWatch(group: group) { return verdict }
    case .full: if !endLongestWatch(group: nil) { return verdict }
    }
    return connections.verdict(group: group, now: Clock.now())
  }

  private func refuse(_ socket: consuming Socket) {
    let text = "this address has too many connections\n"
    let answer = Array(
      ("HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n"
        + "Content-Type: text/plain; charset=utf-8\r\nContent-Length: \(text.utf8.count)\r\n\r\n"
        + text).utf8)
    // A few bytes always fit into a new connection's send buffer.
    _ = try? socket.trySend(answer, from: 0)
    farewells.add(socket, now: Clock.now())
  }

  // MARK: Connections

  private func key(_ connection: OpaquePointer) -> MetadataConnections.Key {
    UInt(bitPattern: connection)
  }

  /// Called when the daemon has taken a connection, or is about to close its socket.
  func changed(_ connection: OpaquePointer, isStart: Bool) {
    if !isStart { return connections.remove(key(connection)) }
    guard let arriving else { return }
    connections.add(
      key(connection), socket: arriving.socket, group: arriving.group, now: Clock.now())
  }

  /// Whether the connection is shut down; requests on it are no longer answered.
  func isClosing(_ connection: OpaquePointer) -> Bool {
    connections[key(connection)]?.isClosing ?? false
  }

  func enter(_ phase: MetadataConnections.Phase, _ connection: OpaquePointer) {
    connections.enter(phase, key(connection), now: Clock.now())
  }

  /// Called when the client has taken its answer.
  func finish(_ connection: OpaquePointer, isKnown: Bool) {
    connections.finish(key(connection), isKnown: isKnown, now: Clock.now())
  }

  /// Records how much memory a connection holds.
  func hold(_ byteCount: Int, _ connection: OpaquePointer) {
    connections.hold(byteCount, key(connection))
  }

  /// Gives all connections more time: while the server did not run, nobody could be served.
  func postpone(nanoseconds: UInt64) { connections.postpone(nanoseconds: nanoseconds) }

  /// Closes a connection that has long held memory in `phase`, unless enough memory is being freed
  /// already.
  func closeHeaviest(in phase: MetadataConnections.Phase, neededBytes: Int) {
    let key = connections.heaviest(in: phase, neededBytes: neededBytes, now: Clock.now())
    guard let key else { return }
    let group = connections.group(of: key)
    Log.warning(
      "metadata server: closing a slow connection, from \(group): others need the memory that it "
        + "holds", about: group)
    close(key)
  }

  private func expire(_ key: MetadataConnections.Key) {
    guard let connection = connections[key] else { return }
    if !connection.isIdle {
      let group = connections.group(of: key)
      Log.warning(
        "metadata server: \(group) "
          + (connection.phase == .answer ? "took no whole answer" : "sent no whole request")
          + " in \(limits.requestMilliseconds) ms: connection closed", about: group)
    }
    close(key)
  }

  /// Shuts the socket down; the daemon sees the end of the stream on its next run.
  private func close(_ key: MetadataConnections.Key) {
    guard let connection = connections[key] else { return }
    connections.startClosing(key)
    _ = shutdown(connection.socket, Int32(SHUT_RDWR))
  }
}
