import CLinux
import Glibc

/// A nonblocking Unix socket that keeps message boundaries and carries descriptors. Names are
/// abstract: they vanish with their owner and are in no file system.
package struct LocalSocket: ~Copyable, Sendable {
  private let descriptor: FileDescriptor

  package var rawValue: Int32 { descriptor.rawValue }

  private init(owning descriptor: consuming FileDescriptor) { self.descriptor = descriptor }

  private init() throws(Errno) {
    let type =
      Int32(SOCK_SEQPACKET.rawValue) | Int32(SOCK_NONBLOCK.rawValue)
      | Int32(SOCK_CLOEXEC.rawValue)
    descriptor = try FileDescriptor(opening: { socket(AF_UNIX, type, 0) }, call: "socket")
  }

  /// Listens under a name.
  package static func listening(on name: String) throws(Errno) -> LocalSocket {
    let socket = try LocalSocket()
    try withAddress(name, "bind") { bind(socket.rawValue, $0, $1) }
    _ = try retryingInterrupts("listen") { listen(socket.rawValue, 128) }
    return socket
  }

  /// Connects to a listener; fails at once if its queue is full.
  package static func connected(to name: String) throws(Errno) -> LocalSocket {
    let socket = try LocalSocket()
    try withAddress(name, "connect") { connect(socket.rawValue, $0, $1) }
    return socket
  }

  /// Accepts a connection; nil when none is waiting.
  package func accept() throws(Errno) -> LocalSocket? {
    let flags = Int32(SOCK_NONBLOCK.rawValue) | Int32(SOCK_CLOEXEC.rawValue)
    while true {
      let result = linux_accept(rawValue, flags)
      if result >= 0 {
        let descriptor = try FileDescriptor.aboveStandard(result)
        return LocalSocket(owning: FileDescriptor(owning: descriptor))
      }
      switch errno {
      case EAGAIN: return nil
      case EINTR, ECONNABORTED: continue
      default: throw Errno(errno, call: "accept4")
      }
    }
  }

  /// The process and user at the other end.
  package func credentials() throws(Errno) -> (process: pid_t, user: uid_t) {
    var credentials = ucred()
    var length = socklen_t(MemoryLayout<ucred>.size)
    if getsockopt(rawValue, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0 {
      throw Errno.current
    }
    return (credentials.pid, credentials.uid)
  }

  /// Sends one message, with up to 4 descriptors, or throws at once.
  package func send(_ bytes: UnsafeRawBufferPointer, descriptors: [Int32] = []) throws(Errno) {
    _ = try retryingInterrupts("sendmsg") {
      linux_send_message(rawValue, bytes.baseAddress, bytes.count, descriptors, descriptors.count)
    }
  }

  /// Receives one message into `bytes`; returns its size (0 once the other end has closed) and the
  /// descriptors, which the caller must close.
  package func receive(
    _ bytes: UnsafeMutableRawBufferPointer
  ) throws(Errno) -> (byteCount: Int, descriptors: [Int32]) {
    var descriptors: [Int32] = [-1, -1, -1, -1]
    var descriptorCount = 0
    let count = try retryingInterrupts("recvmsg") {
      linux_receive_message(
        rawValue, bytes.baseAddress, bytes.count, &descriptors, &descriptorCount)
    }
    return (count, try Self.aboveStandard(descriptors.prefix(descriptorCount)))
  }

  /// Renumbers all descriptors, or closes them all on failure.
  private static func aboveStandard(_ descriptors: ArraySlice<Int32>) throws(Errno) -> [Int32] {
    var result: [Int32] = []
    for (index, descriptor) in zip(descriptors.indices, descriptors) {
      do throws(Errno) {
        result.append(try FileDescriptor.aboveStandard(descriptor))
      } catch {
        for other in result + descriptors[(index + 1)...] { _ = close(other) }
        throw error
      }
    }
    return result
  }

  /// Waits for a message or the other end's close; gives up when `cancellation` is readable.
  package func waitReadable(until deadline: Deadline, cancellation: Int32) throws(Errno) {
    var items = [
      pollfd(fd: rawValue, events: Int16(POLLIN), revents: 0),
      pollfd(fd: cancellation, events: Int16(POLLIN), revents: 0),
    ]
    while poll(&items, 2, deadline.remainingMilliseconds) <= 0 {
      if deadline.hasPassed { throw Errno.timedOut }
    }
    if items[1].revents != 0 { throw Errno(ECANCELED) }
  }

  /// Whether the other end has stopped sending.
  package var isHungUp: Bool {
    var item = pollfd(fd: rawValue, events: Int16(EPOLLRDHUP.rawValue), revents: 0)
    return poll(&item, 1, 0) > 0
  }

  private static func withAddress(
    _ name: String, _ call: StaticString,
    _ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32
  ) throws(Errno) {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    let bytes = Array(name.utf8)
    // The first byte of an abstract name is 0.
    guard !bytes.isEmpty, bytes.count < MemoryLayout.size(ofValue: address.sun_path) else {
      throw Errno(EINVAL)
    }
    withUnsafeMutableBytes(of: &address.sun_path) { path in
      UnsafeMutableRawBufferPointer(rebasing: path[1...]).copyBytes(from: bytes)
    }
    let length = socklen_t(MemoryLayout<sockaddr_un>.offset(of: \.sun_path)! + 1 + bytes.count)
    let result = withUnsafePointer(to: &address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, length) }
    }
    if result != 0 { throw Errno(errno, call: call) }
  }
}
