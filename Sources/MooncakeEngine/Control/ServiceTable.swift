import MooncakeBase
import MooncakeSystem
import Synchronization

/// The services on top of an engine, which the same services in other processes call.
package final class ServiceTable: Sendable {
  /// Answers a call with JSON; nil if the call is for another handler. Runs on the RPC daemon's
  /// thread and must not wait.
  package typealias Handler = @Sendable (JSONValue) -> String?

  private struct State {
    var handlers: [UInt64: Handler] = [:]
    var next: UInt64 = 0
  }
  private let state = Lock(State())

  /// Returns the token for `remove`.
  package func add(_ handler: @escaping Handler) -> UInt64 {
    state.withLock { state in
      state.next += 1
      state.handlers[state.next] = handler
      return state.next
    }
  }

  /// A call that is running on another thread may still end afterwards.
  package func remove(_ token: UInt64) { state.withLock { $0.handlers[token] = nil } }

  func answer(_ call: JSONValue) -> String? {
    for handler in state.withLock({ Array($0.handlers.values) }) {
      if let answer = handler(call) { return answer }
    }
    return nil
  }
}

extension TransferEngine {
  /// As below, but does not wait: `completion` is called once, by the deadline, on a thread that it
  /// must not block.
  package func callService(
    at address: String, _ body: String, until deadline: Deadline,
    _ completion: @escaping RPCCaller.Completion
  ) {
    let peer: HostPort
    do throws(MooncakeError) {
      try checkOpen()
      peer = try Self.parsePeer(address)
    } catch {
      return completion(.failure(error))
    }
    let port = peer.port ?? HandshakeSettings.fromEnvironment().defaultPort
    let named = HostPort(host: peer.host, port: port)
    if port == 0 {
      return completion(
        .failure(
          MooncakeError(
            .invalidArgument, "peer \(named): port 0 cannot be reached: give the peer's RPC port")))
    }
    if let numeric = SocketAddress(numeric: peer.host, port: port) {
      return caller.call(named, at: [numeric], body, until: deadline, completion)
    }
    // Resolving a name takes a thread; nothing else about the call may.
    let isAccepted = workers.run { [self] in
      let call = call(until: deadline)
      do throws(ResolveError) {
        let addresses = try Resolver.resolve(
          peer.host, port: port, deadline: call.deadline, cancellation: call.cancellation)
        caller.call(named, at: addresses[...], body, until: deadline, completion)
      } catch {
        completion(
          .failure(
            MooncakeError(
              error.isCanceled ? .canceled : error.isTimeout ? .timeout : .unresolved,
              "peer \(named): cannot resolve \(peer.host): \(error); check the name and this "
                + "machine's name service")))
      }
    }
    if !isAccepted {
      completion(.failure(MooncakeError(.canceled, "asking a peer: the engine was destroyed")))
    }
  }

  private static func parsePeer(_ address: String) throws(MooncakeError) -> HostPort {
    do throws(HostPortError) { return try HostPort(parsing: address) } catch {
      throw MooncakeError(.protocolViolation, "peer address '\(address.prefix(100))': \(error)")
    }
  }

  /// Calls the services of the process whose RPC daemon is at `address`, "host:port".
  package func callService(
    at address: String, _ body: String, until deadline: Deadline
  ) throws(MooncakeError) -> String {
    try checkOpen()
    let peer = try Self.parsePeer(address)
    return try RPCClient.ask(peer, type: .service, body: body, call(until: deadline))
  }
}
