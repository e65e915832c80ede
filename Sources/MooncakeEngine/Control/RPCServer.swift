import MooncakeBase
import MooncakeSystem
import Synchronization

/// The RPC daemon: answers metadata, notify, probe and service requests of any number of peers on
/// one thread, `mc-rpc`, which sleeps while nobody is connected.
package final class RPCServer: Sendable {
  /// How the daemon asks its engine; called on the daemon's thread, one at a time.
  package struct Handlers: Sendable {
    /// The engine's segment descriptor as JSON; nil while it serves none.
    package var descriptor: @Sendable () -> String?
    /// Takes a notification; returns nil, or why it was refused.
    package var notify: @Sendable (Notification) -> String?
    /// Answers a service call; nil if no service takes it.
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

  /// Limits on what peers may use.
  package struct Limits: Sendable {
    /// Bytes of a request, including the type byte.
    package var messageLength: Int
    /// Beyond it, the quietest connection of the peer with the most connections is closed.
    package var connectionCount = 1024
    /// Connections kept for the next service call; beyond it, the one idle longest is closed.
    package var restingCount = 256
    /// Bytes of all unfinished requests and unsent answers; beyond it, a connection of the peer
    /// that holds the most is closed.
    package var totalByteCount: Int
    /// Time without progress after which a connection is closed.
    package var idleMilliseconds: UInt64 = 5000
    /// Time for a whole exchange, so that a peer that trickles bytes cannot hold a connection
    /// forever.
    package var exchangeMilliseconds: UInt64 = 60_000

    package init(messageLength: Int = HandshakeSettings.fromEnvironment().maximumLength) {
      self.messageLength = messageLength
      totalByteCount = max(64 << 20, 4 * messageLength)
    }
  }

  /// Totals since the start, except `openConnections`.
  package struct Counters: Sendable, Equatable {
    package var acceptedConnections: UInt64 = 0
    package var openConnections: UInt64 = 0
    package var connectionRequests: UInt64 = 0
    package var metadataRequests: UInt64 = 0
    package var notifyRequests: UInt64 = 0
    package var probeRequests: UInt64 = 0
    package var serviceRequests: UInt64 = 0
    /// Closed without an answer because of what they sent.
    package var rejectedConnections: UInt64 = 0
    /// Closed because they were silent or slow.
    package var expiredConnections: UInt64 = 0
  }

  /// Where it listens.
  package let address: SocketAddress

  private let loop: RPCServerLoop
  // The thread, until it has been joined.
  private let thread: Lock<WorkerThread?>

  /// Starts serving on a listening socket.
  package init(
    listener: consuming Socket, handlers: Handlers, limits: Limits = Limits()
  ) throws(MooncakeError) {
    do throws(Errno) {
      address = try listener.localAddress()
      let loop = try RPCServerLoop(listener: listener, handlers: handlers, limits: limits)
      self.loop = loop
      thread = Lock(try WorkerThread.start(name: "mc-rpc") { loop.run() })
    } catch {
      throw MooncakeError(.system, "cannot start the RPC daemon: \(error)")
    }
  }

  deinit { stop() }

  package var counters: Counters { loop.counters.withLock { $0 } }

  /// Closes the listener and every connection and ends the thread; later calls do nothing. Returns
  /// when that is done, unless called from a handler.
  package func stop() {
    loop.requestStop()
    thread.withLock { thread in
      // The thread cannot wait for itself; the next caller joins it.
      guard let running = thread, !running.isCurrent else { return }
      running.join()
      thread = nil
    }
  }
}
