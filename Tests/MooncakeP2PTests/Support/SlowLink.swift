import Glibc
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Synchronization

/// A slow link to an engine. The engine tells peers an address where this listens on both of its
/// ports and forwards what arrives; the data port's output is limited to a total rate. Ends with
/// `stop`.
final class SlowLink: @unchecked Sendable {
  // Unchecked: the acceptor is written once before the object is shared.
  private struct State {
    var threads: [WorkerThread] = []
    var sockets: [Int32] = []
    var isStopping = false
    /// When the link is free again.
    var free: UInt64 = 0
  }
  private let state = Lock(State())
  private let bytesPerSecond: Atomic<UInt64>
  private let sentBytes = Atomic<UInt64>(0)
  private let listeners: [(number: Int32, port: UInt16, isData: Bool)]
  private var acceptor: WorkerThread?

  private static let inside = "127.0.0.1"
  private static let outside = "127.0.0.2"

  /// Options of an engine reached through such a link.
  static func options(_ metadataURI: String?) -> TransferEngine.Options {
    var options = TransferEngine.Options()
    if let metadataURI { options.metadataURI = metadataURI }
    options.transports = ["tcp"]
    options.bindAddress = inside
    options.advertisedAddress = outside
    if metadataURI != nil { options.name = "slow-\(UInt64.random(in: 0 ... .max))" }
    return options
  }

  init(to engine: TransferEngine, bytesPerSecond: UInt64) throws {
    self.bytesPerSecond = Atomic(bytesPerSecond)
    let data = try engine.descriptor(of: 0).tcpDataPort
    listeners = try [(engine.rpcAddress.port ?? 0, false), (data, true)].map { port, isData in
      let socket = try Socket.listening(on: SocketAddress(numeric: Self.outside, port: port)!)
      return (socket.release(), port, isData)
    }
    acceptor = try WorkerThread.start(name: "link") { [unowned self] in accept() }
  }

  /// Bytes received from the data port.
  var dataBytes: UInt64 { sentBytes.load(ordering: .relaxed) }

  /// 0: nothing gets through.
  func setRate(_ rate: UInt64) { bytesPerSecond.store(rate, ordering: .relaxed) }

  /// Breaks all connections.
  func cut() { for socket in state.withLock({ $0.sockets }) { shutdown(socket, Int32(SHUT_RDWR)) } }

  func stop() {
    guard let acceptor else { return }
    self.acceptor = nil
    state.withLock { $0.isStopping = true }
    acceptor.join()
    cut()
    for thread in state.withLock({ $0.threads }) { thread.join() }
    for socket in state.withLock({ $0.sockets }) { close(socket) }
    for listener in listeners { close(listener.number) }
  }

  private var isStopping: Bool { state.withLock { $0.isStopping } }

  private func accept() {
    while !isStopping {
      var items = listeners.map { pollfd(fd: $0.number, events: Int16(POLLIN), revents: 0) }
      if poll(&items, nfds_t(items.count), 20) <= 0 { continue }
      for (listener, item) in zip(listeners, items) where item.revents != 0 {
        let peer = Glibc.accept(listener.number, nil, nil)
        if peer < 0 { continue }
        _ = fcntl(peer, F_SETFL, fcntl(peer, F_GETFL) & ~O_NONBLOCK)
        let own = Self.connect(listener.port)
        state.withLock { state in
          state.sockets += [peer, own]
          let ways = [(peer, own, false), (own, peer, listener.isData)]
          for (from, to, isSlow) in ways {
            let thread = try? WorkerThread.start(name: "link") { [unowned self] in
              carry(from, to, isSlow: isSlow)
            }
            if let thread { state.threads.append(thread) }
          }
        }
      }
    }
  }

  private static func connect(_ port: UInt16) -> Int32 {
    let number = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
    // Small buffers, so that both ends have seen about the same.
    var size: Int32 = 64 << 10
    setsockopt(number, SOL_SOCKET, SO_RCVBUF, &size, 4)
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_port = port.bigEndian
    address.sin_addr.s_addr = inet_addr(inside)
    withUnsafePointer(to: &address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        _ = Glibc.connect(number, $0, socklen_t(MemoryLayout<sockaddr_in>.size))
      }
    }
    return number
  }

  private func carry(_ from: Int32, _ to: Int32, isSlow: Bool) {
    var bytes = [UInt8](repeating: 0, count: 16 << 10)
    while true {
      let count = recv(from, &bytes, bytes.count, 0)
      if count <= 0 { break }
      if isSlow && !pass(UInt64(count)) { break }
      var sent = 0
      while sent < count {
        let part = bytes.withUnsafeBytes {
          send(to, $0.baseAddress! + sent, count - sent, Int32(MSG_NOSIGNAL))
        }
        if part <= 0 { break }
        sent += part
      }
      if sent < count { break }
    }
    shutdown(from, Int32(SHUT_RD))
    shutdown(to, Int32(SHUT_WR))
  }

  /// Waits until the link has room for that many bytes; returns false if it does not get it.
  private func pass(_ count: UInt64) -> Bool {
    while bytesPerSecond.load(ordering: .relaxed) == 0 {
      if isStopping { return false }
      usleep(5000)
    }
    let rate = bytesPerSecond.load(ordering: .relaxed)
    let end = state.withLock { state in
      state.free = max(state.free, Clock.now()) + count * 1_000_000_000 / rate
      return state.free
    }
    while Clock.now() < end {
      if isStopping { return false }
      sleepBriefly(nanoseconds: min(end &- min(end, Clock.now()), 5_000_000))
    }
    sentBytes.wrappingAdd(count, ordering: .relaxed)
    return true
  }
}
