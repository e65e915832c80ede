import CLinux
import MooncakeSystem
import Synchronization

/// The RPC daemon's event loop; everything but `requestStop` and `counters` belongs to its thread.
final class RPCServerLoop: @unchecked Sendable {
  // Unchecked: one thread runs the loop; what others use is synchronized by itself.
  let counters = Lock(RPCServer.Counters())

  private let handlers: RPCServer.Handlers
  private let limits: RPCServer.Limits
  private let stopEvent: EventFD
  private let isStopping = Atomic(false)
  private let epoll: Epoll
  // Closed when the loop ends, so that the port is free once `stop` returns.
  private var listener: Socket?
  private var connections: [UInt64: RPCConnection] = [:]
  private var nextToken = firstConnectionToken
  /// When accepting goes on after the process ran out of descriptors; nil while it accepts.
  private var acceptPause: Deadline?
  private var log = RateLimitedLog()

  private static let stopToken: UInt64 = 0
  private static let listenerToken: UInt64 = 1
  private static let firstConnectionToken: UInt64 = 2
  private static let acceptPauseMilliseconds: UInt64 = 100
  private static let scratchBytes = 64 << 10

  init(
    listener: consuming Socket, handlers: RPCServer.Handlers, limits: RPCServer.Limits
  ) throws(Errno) {
    self.handlers = handlers
    self.limits = limits
    stopEvent = try EventFD()
    epoll = try Epoll()
    try epoll.add(
      stopEvent.descriptor.rawValue, events: Epoll.readable, token: Self.stopToken)
    try epoll.add(listener.rawValue, events: Epoll.readable, token: Self.listenerToken)
    self.listener = consume listener
  }

  /// Makes `run` return soon; from any thread.
  func requestStop() {
    isStopping.store(true, ordering: .releasing)
    stopEvent.signal()
  }

  func run() {
    let events = UnsafeMutableBufferPointer<epoll_event>.allocate(capacity: 64)
    let scratch = UnsafeMutableRawBufferPointer.allocate(
      byteCount: Self.scratchBytes, alignment: 16)
    defer {
      events.deallocate()
      scratch.deallocate()
    }
    while !isStopping.load(ordering: .acquiring) {
      let count = epoll.wait(
        into: events, timeoutMilliseconds: nextDeadline().remainingMilliseconds)
      for index in 0..<count { handle(events[index], scratch) }
      closeExpired()
      resumeAccepting()
    }
    connections.removeAll()
    counters.withLock { $0.openConnections = 0 }
    listener = nil
  }

  private func handle(_ event: epoll_event, _ scratch: UnsafeMutableRawBufferPointer) {
    let token = event.data.u64
    switch token {
    case Self.stopToken: stopEvent.clear()
    case Self.listenerToken: acceptAll()
    default:
      guard let connection = connections[token] else { return }
      switch connection.advance(scratch: scratch, answer: answer) {
      case .goOn(let events):
        do throws(Errno) {
          try epoll.modify(connection.rawValue, events: events, token: token)
        } catch {
          close(token)
        }
      case .finished: close(token)
      case .rejected(let reason): reject(token, reason)
      }
    }
  }

  // MARK: Connections

  private func acceptAll() {
    while true {
      do throws(Errno) {
        guard let socket = try listener?.accept() else { return }
        try adopt(socket)
      } catch {
        // Out of descriptors or memory. The waiting peer would make epoll return at once again and
        // again, so the listener rests.
        log.warning("RPC daemon: cannot accept a connection: \(error)")
        if let listener = listener?.rawValue { epoll.remove(listener) }
        acceptPause = .after(milliseconds: Self.acceptPauseMilliseconds)
        return
      }
    }
  }

  private func adopt(_ socket: consuming Socket) throws(Errno) {
    if connections.count >= limits.connectionCount { closeQuietest() }
    let token = nextToken
    nextToken &+= 1
    socket.setNoDelay()
    let connection = RPCConnection(socket: socket, limits: limits)
    try epoll.add(connection.rawValue, events: Epoll.readable, token: token)
    connections[token] = connection
    updateCounters { $0.acceptedConnections += 1 }
  }

  private func resumeAccepting() {
    guard let pause = acceptPause, pause.hasPassed, let descriptor = listener?.rawValue else {
      return
    }
    acceptPause = nil
    do throws(Errno) {
      try epoll.add(descriptor, events: Epoll.readable, token: Self.listenerToken)
    } catch {
      acceptPause = .after(milliseconds: Self.acceptPauseMilliseconds)
    }
  }

  private func closeQuietest() {
    guard
      let quietest = connections.min(by: { $0.value.lastProgress < $1.value.lastProgress })
    else { return }
    log.warning(
      "RPC daemon: \(limits.connectionCount) connections are open; closing the quietest, from "
        + quietest.value.peerName)
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
      if !connection.hasAnswered {
        log.warning(
          "RPC daemon: \(connection.peerName) sent no complete request in time "
            + "(\(connection.receivedByteCount) bytes); connection closed")
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
      log.warning("RPC daemon: \(peer) sent \(reason); connection closed without an answer")
    }
    close(token)
    updateCounters { $0.rejectedConnections += 1 }
  }

  private func close(_ token: UInt64) {
    // Closing the descriptor takes it out of the epoll set.
    connections[token] = nil
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

  private func answer(_ message: RPCMessage) throws(JSONError) -> [UInt8] {
    updateCounters { counters in
      switch message.type {
      case .connection: counters.connectionRequests += 1
      case .metadata: counters.metadataRequests += 1
      case .notify: counters.notifyRequests += 1
      case .probe: counters.probeRequests += 1
      case .service: counters.serviceRequests += 1
      }
    }
    let body = try RPCAnswer.body(to: message, handlers: handlers)
    return RPCMessage.encoded(
      type: message.type, isOldProtocol: message.isOldProtocol, body: body)
  }
}
