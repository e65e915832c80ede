import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// Accepts data connections and spreads them over server loops.
package final class TCPServer: @unchecked Sendable {
  // Unchecked: threads and listener are set in `init` and end under the `isStopped` exchange.
  package let address: SocketAddress
  // Closed by `stop`, so that later peers are refused instead of waiting in its queue.
  private var listener: Socket?
  private let wakeup: EventFD
  private let loops: [TCPServerLoop]
  private var threads: [WorkerThread] = []
  private let isStopped = Atomic<Bool>(false)
  private let counters: TCPCounters

  private static let connectionLimit = 65_536
  /// The pause in accepting when the process is out of descriptors.
  private static let restMilliseconds: Int32 = 100

  /// Serves connections of a listening socket until `stop`.
  package init(
    listener: consuming Socket, buffers: BufferTable, counters: TCPCounters,
    threadCount: Int, spinNanoseconds: UInt64, processors: ProcessorSet?
  ) throws(MooncakeError) {
    do throws(Errno) {
      address = try listener.localAddress()
      self.listener = consume listener
      self.counters = counters
      wakeup = try EventFD()
      var loops: [TCPServerLoop] = []
      for _ in 0..<threadCount {
        loops.append(
          try TCPServerLoop(
            buffers: buffers, counters: counters, spinNanoseconds: spinNanoseconds))
      }
      self.loops = loops
    } catch {
      throw Self.startFailure(error)
    }
    do throws(Errno) {
      for (index, loop) in loops.enumerated() {
        threads.append(
          try WorkerThread.start(name: "mc-tcp-srv\(index)", on: processors) {
            loop.run()
          })
      }
      threads.append(try WorkerThread.start(name: "mc-tcp-accept") { [unowned self] in accept() })
    } catch {
      stop()
      throw Self.startFailure(error)
    }
  }

  private static func startFailure(_ error: Errno) -> MooncakeError {
    MooncakeError(.system, "starting the TCP server: \(error)")
  }

  /// Closes every connection that is in the middle of a request on one of the ranges. When it
  /// returns, the server neither reads nor writes them.
  package func revoke(_ ranges: [RemoteBuffer]) {
    if isStopped.load(ordering: .acquiring) { return }
    let acknowledgment = TCPServerLoop.Acknowledgment(loops.count)
    for loop in loops { loop.revoke(ranges, acknowledgment) }
    acknowledgment.wait()
  }

  /// Closes everything and joins the threads; idempotent.
  package func stop() {
    if isStopped.exchange(true, ordering: .acquiringAndReleasing) { return }
    wakeup.signal()
    for loop in loops { loop.stop() }
    for thread in threads { thread.join() }
    threads.removeAll()
    listener = nil
  }

  private func accept() {
    guard let descriptor = listener?.rawValue else { return }
    var next = 0
    var items = [
      pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0),
      pollfd(fd: wakeup.descriptor.rawValue, events: Int16(POLLIN), revents: 0),
    ]
    while !isStopped.load(ordering: .acquiring) {
      if poll(&items, 2, -1) < 0 { continue }
      do throws(Errno) {
        while let socket = try listener?.accept() {
          if counters.connections.load(ordering: .relaxed) >= Self.connectionLimit { continue }
          admit(socket, to: loops[next % loops.count])
          next += 1
        }
      } catch {
        Log.warning("tcp server \(address): accept: \(error); resting \(Self.restMilliseconds) ms")
        _ = poll(&items[1], 1, Self.restMilliseconds)
      }
    }
  }

  private func admit(_ socket: consuming Socket, to loop: TCPServerLoop) {
    socket.setNoDelay()
    // The connection of a peer that vanished is closed within minutes.
    socket.keepAlive(idleSeconds: 60)
    do throws(Errno) {
      let peer = try socket.peerAddress()
      if peer.isLoopback { socket.setLocal(bufferBytes: TCPWire.localSocketBufferBytes) }
      loop.adopt(socket, peer: peer.description)
    } catch {
      // ENOTCONN: gone already. Where a sandbox forbids the call, the peer is served without a
      // name.
      if error.rawValue != ENOTCONN { loop.adopt(socket, peer: "of unknown address") }
    }
  }
}
