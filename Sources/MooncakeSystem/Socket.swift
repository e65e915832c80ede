import CLinux
import Glibc

/// A nonblocking, close-on-exec TCP socket.
package struct Socket: ~Copyable, Sendable {
  private let descriptor: FileDescriptor

  package var rawValue: Int32 { descriptor.rawValue }

  package init(owning descriptor: consuming FileDescriptor) { self.descriptor = descriptor }

  package init(family: Int32) throws(Errno) {
    let type =
      Int32(SOCK_STREAM.rawValue) | Int32(SOCK_NONBLOCK.rawValue)
      | Int32(SOCK_CLOEXEC.rawValue)
    descriptor = try FileDescriptor(opening: { socket(family, type, 0) }, call: "socket")
  }

  /// Listens on an address; port 0 lets the system choose. No address reuse beyond TIME_WAIT: two
  /// listeners never share a port.
  package static func listening(
    on address: SocketAddress, backlog: Int32 = 1024
  ) throws(Errno) -> Socket {
    let socket = try Socket(family: address.family)
    try socket.set(SOL_SOCKET, SO_REUSEADDR, 1)
    // "::" serves IPv4 too, as peers expect from the any-address.
    if address.isIPv6 { try socket.set(Int32(IPPROTO_IPV6), IPV6_V6ONLY, address.isAny ? 0 : 1) }
    if address.withPointer({ bind(socket.rawValue, $0, $1) }) != 0 {
      throw Errno(errno, call: "bind")
    }
    _ = try retryingInterrupts("listen") { listen(socket.rawValue, backlog) }
    return socket
  }

  /// Starts a connect; it is over when the socket is writable, and `takeError` tells how it ended.
  package func startConnect(to address: SocketAddress) throws(Errno) {
    if address.withPointer({ connect(rawValue, $0, $1) }) == 0 { return }
    let error = Errno.current
    if error.rawValue != EINPROGRESS && error != .interrupted { throw error }
  }

  /// Accepts a connection; nil when none is waiting.
  package func accept() throws(Errno) -> Socket? {
    let flags = Int32(SOCK_NONBLOCK.rawValue) | Int32(SOCK_CLOEXEC.rawValue)
    while true {
      let result = linux_accept(rawValue, flags)
      if result >= 0 {
        let descriptor = try FileDescriptor.aboveStandard(result)
        return Socket(owning: FileDescriptor(owning: descriptor))
      }
      let error = Errno.current
      switch error.rawValue {
      case EAGAIN: return nil
      // The connection died in the queue; try the next one.
      case EINTR, ECONNABORTED, EPROTO: continue
      default: throw error
      }
    }
  }

  /// The pending error of the socket, cleared by this call; nil if none.
  package func takeError() -> Errno? {
    var value: Int32 = 0
    var length = socklen_t(MemoryLayout<Int32>.size)
    if getsockopt(rawValue, SOL_SOCKET, SO_ERROR, &value, &length) != 0 { return .current }
    return value == 0 ? nil : Errno(value)
  }

  package func set(_ level: Int32, _ option: Int32, _ value: Int32) throws(Errno) {
    var value = value
    if setsockopt(rawValue, level, option, &value, socklen_t(MemoryLayout<Int32>.size)) != 0 {
      throw Errno.current
    }
  }

  /// For a connection inside one host: fixes the kernel's buffer sizes instead of letting it tune
  /// them, and selects Reno, which every kernel has and any user may choose. The system's default
  /// may be meant for networks: BBR paces its sends and is a third slower here.
  package func setLocal(bufferBytes: Int32) {
    try? set(SOL_SOCKET, SO_SNDBUF, bufferBytes)
    try? set(SOL_SOCKET, SO_RCVBUF, bufferBytes)
    let name: StaticString = "reno"
    _ = setsockopt(
      rawValue, Int32(IPPROTO_TCP), TCP_CONGESTION, name.utf8Start,
      socklen_t(name.utf8CodeUnitCount))
  }

  /// Gives the descriptor to the caller, who must close it.
  package consuming func release() -> Int32 { descriptor.release() }

  /// Enables keep-alive probes after `idleSeconds` of silence.
  package func keepAlive(idleSeconds: Int32) {
    try? set(SOL_SOCKET, SO_KEEPALIVE, 1)
    try? set(Int32(IPPROTO_TCP), TCP_KEEPIDLE, idleSeconds)
  }

  /// How long the kernel keeps trying to reach a peer that does not answer.
  package func setPatience(milliseconds: Int32) {
    try? set(Int32(IPPROTO_TCP), TCP_USER_TIMEOUT, milliseconds)
  }

  package func setNoDelay() { try? set(Int32(IPPROTO_TCP), TCP_NODELAY, 1) }

  package func localAddress() throws(Errno) -> SocketAddress {
    try SocketAddress.filled("getsockname") { getsockname(rawValue, $0, $1) }
  }

  package func peerAddress() throws(Errno) -> SocketAddress {
    try SocketAddress.filled("getpeername") { getpeername(rawValue, $0, $1) }
  }

  /// Makes close send a reset, which the peer cannot mistake for an orderly end.
  package func resetOnClose() {
    var option = linger(l_onoff: 1, l_linger: 0)
    setsockopt(
      rawValue, SOL_SOCKET, SO_LINGER, &option, socklen_t(MemoryLayout<linger>.size))
  }

  package func shutdownWrite() { _ = shutdown(rawValue, Int32(SHUT_WR)) }

  /// Waits until the socket has one of `events` (POLLIN, POLLOUT), an error or a hang-up. Throws
  /// ECANCELED as soon as the descriptor `cancellation` (-1 for none) is readable.
  package func wait(
    for events: Int32, until deadline: Deadline, cancellation: Int32 = -1
  ) throws(Errno) {
    // poll ignores a negative descriptor.
    var items = (
      pollfd(fd: rawValue, events: Int16(events), revents: 0),
      pollfd(fd: cancellation, events: Int16(POLLIN), revents: 0)
    )
    while true {
      let count = withUnsafeMutableBytes(of: &items) {
        poll(
          $0.baseAddress!.assumingMemoryBound(to: pollfd.self), 2, deadline.remainingMilliseconds)
      }
      if items.1.revents != 0 { throw Errno(ECANCELED) }
      if count > 0 { return }
      if count == 0 {
        if deadline.hasPassed { throw Errno.timedOut }
        continue
      }
      if Errno.current != .interrupted { throw Errno.current }
    }
  }
}
