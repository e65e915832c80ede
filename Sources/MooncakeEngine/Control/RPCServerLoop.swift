import MooncakeBase
import MooncakeSystem

/// The RPC daemon's event loop; everything but `requestStop` and `counters` belongs to its thread.
final class RPCServerLoop: @unchecked Sendable {
  // Unchecked: one thread runs the loop; members that others use are synchronized.
  let counters = Lock(RPCServer.Counters())

  private let handlers: RPCServer.Handlers
  private let limits: RPCServer.Limits
  private let loop: RPCEventLoop
  // Closed when the loop ends, so that the port is free once `stop` returns.
  private var listener: Socket?
  private var connections: [UInt64: RPCConnection] = [:]
  private var nextToken = firstConnectionToken
  private var restingCount = 0
  /// When to accept again after the process ran out of descriptors; nil while accepting.
  private var acceptPause: Deadline?
  private var budget: RPCBudget
  /// The last descriptor's text, and the answer made from it.
  private var descriptor = (text: "", output: RPCOutput([], isShared: true))

  private static let listenerToken = RPCEventLoop.wakeToken + 1
  private static let firstConnectionToken = listenerToken + 1
  private static let acceptPauseMilliseconds: UInt64 = 100

  init(
    listener: consuming Socket, handlers: RPCServer.Handlers, limits: RPCServer.Limits
  ) throws(Errno) {
    self.handlers = handlers
    self.limits = limits
    budget = RPCBudget(limit: limits.totalByteCount)
    loop = try RPCEventLoop()
    try loop.epoll.add(listener.rawValue, events: Epoll.readable, token: Self.listenerToken)
    self.listener = consume listener
  }

  /// Makes `run` return soon; from any thread.
  func requestStop() { loop.requestStop() }

  func run() {
    loop.run(until: nextDeadline, handle) {
      closeExpired()
      resumeAccepting()
    }
    connections.removeAll()
    counters.withLock { $0.openConnections = 0 }
    listener = nil
  }

  private func handle(_ token: UInt64, _ scratch: UnsafeMutableRawBufferPointer) {
    switch token {
    case RPCEventLoop.wakeToken: break
    case Self.listenerToken: acceptAll()
    default:
      guard let connection = connections[token] else { return }
      let outcome = connection.advance(scratch: scratch, answer: answer)
      account(for: connection)
      count(connection, isResting: connection.isResting)
      switch outcome {
      case .goOn(let events):
        do throws(Errno) {
          try loop.epoll.modify(connection.rawValue, events: events, token: token)
        } catch {
          close(token)
        }
      case .finished: close(token)
      case .rejected(let reason): reject(token, reason)
      }
      if restingCount > limits.restingCount { closeResting() }
      while budget.isExceeded, closeLargest() {}
    }
  }

  // MARK: Connections

  private func acceptAll() {
    while true {
      do throws(Errno) {
        guard let socket = try listener?.accept() else { return }
        try adopt(socket)
      } catch {
        // Out of descriptors or memory. The waiting peer would make epoll return at once, again and
        // again, so stop listening for a while.
        Log.warning("RPC daemon: cannot accept a connection: \(error)")
        if let listener = listener?.rawValue { loop.epoll.remove(listener) }
        acceptPause = .after(milliseconds: Self.acceptPauseMilliseconds)
        return
      }
    }
  }

  private func adopt(_ socket: consuming Socket) throws(Errno) {
    if connections.count >= limits.connectionCount && !closeResting() { closeQuietest() }
    let token = nextToken
    nextToken &+= 1
    socket.setNoDelay()
    let connection = RPCConnection(socket: socket, limits: limits)
    try loop.epoll.add(connection.rawValue, events: Epoll.readable, token: token)
    connections[token] = connection
    budget.addConnection(connection.group)
    updateCounters { $0.acceptedConnections += 1 }
  }

  private func account(for connection: RPCConnection) {
    let held = connection.held
    if held == connection.accounted { return }
    budget.change(connection.group, from: connection.accounted, to: held)
    connection.accounted = held
  }

  /// Closes a connection to make room in the budget; false if there is none to close.
  private func closeLargest() -> Bool {
    let group = budget.largest
    let members = connections.filter { $0.value.group == group }
    guard let largest = members.max(by: { $0.value.held.total < $1.value.held.total }) else {
      return false
    }
    let held = largest.value.held.total
    reject(
      largest.key, "messages that hold \(held) of the \(limits.totalByteCount) bytes for all peers")
    return held > 0
  }

  private func resumeAccepting() {
    guard let pause = acceptPause, pause.hasPassed, let descriptor = listener?.rawValue else {
      return
    }
    acceptPause = nil
    do throws(Errno) {
      try loop.epoll.add(descriptor, events: Epoll.readable, token: Self.listenerToken)
    } catch {
      acceptPause = .after(milliseconds: Self.acceptPauseMilliseconds)
    }
  }

  private func count(_ connection: RPCConnection, isResting: Bool) {
    if connection.isCountedResting == isResting { return }
    connection.isCountedResting = isResting
    restingCount += isResting ? 1 : -1
  }

  /// Closes the connection that has been resting longest; false if none is.
  @discardableResult
  private func closeResting() -> Bool {
    let resting = connections.filter { $0.value.isResting }
    guard let oldest = resting.min(by: { $0.value.lastProgress < $1.value.lastProgress }) else {
      return false
    }
    close(oldest.key)
    return true
  }

  private func closeQuietest() {
    let group = budget.busiest
    let members = connections.filter { $0.value.group == group }
    guard let quietest = members.min(by: { $0.value.lastProgress < $1.value.lastProgress }) else {
      return
    }
    Log.warning(
      "RPC daemon: \(limits.connectionCount) connections are open; closing the quietest, from "
        + quietest.value.peerName, about: Log.host(of: quietest.value.peerName))
    expire(quietest.key)
  }

  private func nextDeadline() -> Deadline {
    var next = acceptPause ?? .never
    for connection in connections.values { next = min(next, connection.deadline) }
    return next
  }

  private func closeExpired() {
    let expired = connections.filter { $0.value.deadline.hasPassed }
    for (token, connection) in expired {
      if connection.isResting {
        close(token)
        continue
      }
      if !connection.hasAnswered {
        Log.warning(
          "RPC daemon: \(connection.peerName) sent no complete request in time "
            + "(\(connection.receivedByteCount) bytes); connection closed",
          about: Log.host(of: connection.peerName))
      }
      expire(token)
    }
  }

  private func expire(_ token: UInt64) {
    close(token)
    updateCounters { $0.expiredConnections += 1 }
  }

  private func reject(_ token: UInt64, _ reason: String) {
    if let peer = connections[token]?.peerName {
      Log.warning(
        "RPC daemon: \(peer) sent \(reason); connection closed without an answer",
        about: Log.host(of: peer))
    }
    close(token)
    updateCounters { $0.rejectedConnections += 1 }
  }

  private func close(_ token: UInt64) {
    // Closing the descriptor takes it out of the epoll set.
    if let connection = connections.removeValue(forKey: token) {
      count(connection, isResting: false)
      budget.change(connection.group, from: connection.accounted, to: RPCConnection.Held())
      budget.removeConnection(connection.group)
    }
    updateCounters { _ in }
  }

  private func updateCounters(_ change: (inout RPCServer.Counters) -> Void) {
    let open = UInt64(connections.count)
    counters.withLock {
      change(&$0)
      $0.openConnections = open
    }
  }

  // MARK: Answers

  private func answer(_ message: RPCMessage) throws(JSONError) -> RPCOutput {
    updateCounters { counters in
      switch message.type {
      case .connection: counters.connectionRequests += 1
      case .metadata: counters.metadataRequests += 1
      case .notify: counters.notifyRequests += 1
      case .probe: counters.probeRequests += 1
      case .service: counters.serviceRequests += 1
      }
    }
    var keeps = false
    let body = try RPCAnswer.body(to: message, handlers: handlers, keeps: &keeps)
    if message.type == .metadata { return sharedOutput(body) }
    return RPCOutput(
      RPCMessage.encoded(type: message.type, isOldProtocol: message.isOldProtocol, body: body),
      isShared: false, keeps: keeps)
  }

  /// One copy for all peers that ask while the descriptor stays the same.
  private func sharedOutput(_ body: String) -> RPCOutput {
    if body != descriptor.text {
      descriptor.output.outdate(budget.outdated)
      descriptor = (
        body, RPCOutput(RPCMessage.encoded(type: .metadata, body: body), isShared: true)
      )
    }
    return descriptor.output
  }
}
