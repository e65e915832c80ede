import MooncakeBase
import MooncakeSystem
import Synchronization

/// The RPC daemon: answers metadata, notify and probe requests of any number of peers on one
/// thread, `mc-rpc`, which sleeps while nobody is connected.
package final class RPCServer: Sendable {
  /// What the daemon asks its engine; called on the daemon's thread, one call at a time.
  package struct Handlers: Sendable {
    /// The engine's segment descriptor as JSON; nil while it serves none.
    package var descriptor: @Sendable () -> String?
    /// Takes a notification; returns nil, or why it was refused.
    package var notify: @Sendable (Notification) -> String?
    /// Answers a call of a service; nil if nobody offers it.
    package var service: @Sendable (JSONValue) -> String?

    package init(
      descriptor: @escaping @Sendable () -> String?,
      notify: @escaping @Sendable (Notification) -> String?,
      service: @escaping @Sendable (JSONValue) -> String? = { _ in nil }
    ) {
      self.descriptor = descriptor
      self.notify = notify
      self.service = service
    }
  }

  /// Bounds on what a peer may cost.
  package struct Limits: Sendable {
    /// Bytes of a request, type byte included.
    package var messageLength: Int
    /// Beyond it the quietest connection of the peer that has most is closed.
    package var connectionCount = 1024
    /// Kept for the next call of a service; beyond it the one that rests longest is closed.
    package var restingCount = 256
    /// Bytes of unfinished requests and unsent answers of all; beyond it a connection of the peer
    /// that holds most is closed.
    package var totalByteCount: Int
    /// Time without progress after which a connection is closed.
    package var idleMilliseconds: UInt64 = 5000
    /// Time for a whole exchange, so that progress by the byte holds a connection no longer.
    package var exchangeMilliseconds: UInt64 = 60_000

    package init(messageLength: Int = HandshakeSettings.fromEnvironment().maximumLength) {
      self.messageLength = messageLength
      totalByteCount = max(64 << 20, 4 * messageLength)
    }
  }

  /// Counts since the start, except `openConnections`.
  package struct Counters: Sendable, Equatable {
    package var acceptedConnections: UInt64 = 0
    package var openConnections: UInt64 = 0
    package var connectionRequests: UInt64 = 0
    package var metadataRequests: UInt64 = 0
    package var notifyRequests: UInt64 = 0
    package var probeRequests: UInt64 = 0
    package var serviceRequests: UInt64 = 0
    /// Closed without an answer for what they sent.
    package var rejectedConnections: UInt64 = 0
    /// Closed because they were silent or slow.
    package var expiredConnections: UInt64 = 0
  }

  /// Where it listens.
  package let address: SocketAddress

  private let loop: RPCServerLoop
  // Holds the thread until it has been joined.
  private let thread: Lock<WorkerThread?>

  /// Starts to serve on a listening socket.
  package init(
    listener: consuming Socket, handlers: Handlers, limits: Limits = Limits()
  ) throws(EngineError) {
    do throws(Errno) {
      address = try listener.localAddress()
      let loop = try RPCServerLoop(listener: listener, handlers: handlers, limits: limits)
      self.loop = loop
      thread = Lock(try WorkerThread.start(name: "mc-rpc") { loop.run() })
    } catch {
      throw EngineError(.system, "cannot start the RPC daemon: \(error)")
    }
  }

  deinit { stop() }

  package var counters: Counters { loop.counters.withLock { $0 } }

  /// Closes the listener and every connection and ends the thread; later calls do nothing. Returns
  /// when all that is done, unless a handler calls it.
  package func stop() {
    loop.requestStop()
    thread.withLock { thread in
      // The thread cannot wait for itself; whoever calls next joins it.
      guard let running = thread, !running.isCurrent else { return }
      running.join()
      thread = nil
    }
  }
}
