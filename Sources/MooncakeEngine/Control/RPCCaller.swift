import MooncakeBase
import MooncakeSystem
import Synchronization

/// Calls the RPC daemons of any number of peers on one thread, `mc-rpc-call`, so that silent peers
/// do not delay calls to others. A connection is kept for a while for the next call.
package final class RPCCaller: Sendable {
  /// Runs on the caller's thread and must not wait.
  package typealias Completion = @Sendable (Result<String, MooncakeError>) -> Void

  private struct State {
    var loop: RPCCallerLoop?
    var thread: WorkerThread?
    var isStopped = false
  }
  private let state = Lock(State())

  package init() {}

  /// Sends a service call, a non-empty JSON object, to a daemon; `completion` is called once, by
  /// the deadline. If a peer has several addresses, they are tried one after another until one can
  /// be reached.
  package func call(
    _ peer: HostPort, at addresses: ArraySlice<SocketAddress>, _ body: String,
    until deadline: Deadline, _ completion: @escaping Completion
  ) {
    guard let address = addresses.first else {
      return completion(
        .failure(MooncakeError(.unresolved, "peer \(peer): the name has no address: check it")))
    }
    let others = addresses.dropFirst()
    ask(peer, at: address, addressCount: addresses.count, body, until: deadline) { [self] result in
      if case .failure(let error) = result, error.code == .unreachable, !others.isEmpty,
        !deadline.hasPassed
      {
        call(peer, at: others, body, until: deadline, completion)
      } else {
        completion(result)
      }
    }
  }

  private func ask(
    _ peer: HostPort, at address: SocketAddress, addressCount: Int, _ body: String,
    until deadline: Deadline, _ completion: @escaping Completion
  ) {
    do throws(MooncakeError) {
      try loop().submit(
        RPCQuestion(
          call: RPCCall(
            peer: peer, type: .service, settings: .fromEnvironment(), call: Call(until: deadline)),
          address: address, addressCount: addressCount,
          bytes: RPCMessage.encoded(type: .service, body: Self.kept(body)),
          completion: completion))
    } catch {
      completion(.failure(error))
    }
  }

  /// Runs `body`, which must not wait, on the caller's thread soon after the deadline, unless
  /// stopped before.
  package func run(at deadline: Deadline, _ body: @escaping @Sendable () -> Void) {
    do throws(MooncakeError) { try loop().submit(at: deadline, body) } catch {
      if error.code == .canceled { return }
      Log.error("\(error.message): what waits for a peer may end seconds after its deadline")
    }
  }

  /// The body with a request to keep the connection.
  private static func kept(_ body: String) -> String { #"{"keep":true,"# + body.dropFirst() }

  /// Waits until every call has been answered or has failed.
  package func drain(until deadline: Deadline) {
    guard let loop = state.withLock({ $0.loop }) else { return }
    while loop.pendingCount > 0 && !deadline.hasPassed {
      sleepBriefly(nanoseconds: 1_000_000)
    }
  }

  /// Ends every call as canceled.
  package func stop() {
    let running = state.withLock { state in
      state.isStopped = true
      defer { (state.loop, state.thread) = (nil, nil) }
      return (state.loop, state.thread)
    }
    running.0?.requestStop()
    guard let thread = running.1 else { return }
    // A completion may have held the last reference to the engine, so this may run on the thread
    // itself.
    if thread.isCurrent { thread.detach() } else { thread.join() }
  }

  /// The loop, started by the first call.
  private func loop() throws(MooncakeError) -> RPCCallerLoop {
    let outcome: Result<RPCCallerLoop, MooncakeError> = state.withLock { state in
      if let loop = state.loop { return .success(loop) }
      if state.isStopped {
        return .failure(MooncakeError(.canceled, "asking a peer: the engine was destroyed"))
      }
      do throws(Errno) {
        let loop = try RPCCallerLoop()
        state.thread = try WorkerThread.start(name: "mc-rpc-call") { loop.run() }
        state.loop = loop
        return .success(loop)
      } catch {
        return .failure(MooncakeError(.system, "starting the thread mc-rpc-call: \(error)"))
      }
    }
    return try outcome.get()
  }
}
