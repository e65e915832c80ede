import CLinux
import Glibc

/// A nonblocking socket to processes of this machine that keeps messages apart and carries
/// descriptors. Names are abstract: they vanish with their owner and belong to no file system.
package struct LocalSocket: ~Copyable, Sendable {
  private let descriptor: FileDescriptor

  package var rawValue: Int32 { descriptor.rawValue }

  private init(owning descriptor: consuming FileDescriptor) { self.descriptor = descriptor }

  private init() throws(Errno) {
    let type =
      Int32(SOCK_SEQPACKET.rawValue) | Int32(SOCK_NONBLOCK.rawValue)
      | Int32(SOCK_CLOEXEC.rawValue)
    descriptor = try FileDescriptor(opening: { socket(AF_UNIX, type, 0) })
  }

  /// Listens under a name.
  package static func listening(on name: String) throws(Errno) -> LocalSocket {
    let socket = try LocalSocket()
    try withAddress(name) { bind(socket.rawValue, $0, $1) }
    if listen(socket.rawValue, 128) != 0 { throw Errno.current }
    return socket
  }

  /// Connects to a listener; fails at once if its queue is full.
  package static func connected(to name: String) throws(Errno) -> LocalSocket {
    let socket = try LocalSocket()
    try withAddress(name) { connect(socket.rawValue, $0, $1) }
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
      default: throw Errno.current
      }
    }
  }

  /// Process and user that connected, or that listened, at the other end.
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
    _ = try retryingInterrupts {
      linux_send_message(rawValue, bytes.baseAddress, bytes.count, descriptors, descriptors.count)
    }
  }

  /// Receives one message into `bytes`; returns its size, 0 at the end, and the descriptors, which
  /// the caller must close.
  package func receive(
    _ bytes: UnsafeMutableRawBufferPointer
  ) throws(Errno) -> (byteCount: Int, descriptors: [Int32]) {
    var descriptors: [Int32] = [-1, -1, -1, -1]
    var descriptorCount = 0
    let count = try retryingInterrupts {
      linux_receive_message(
        rawValue, bytes.baseAddress, bytes.count, &descriptors, &descriptorCount)
    }
    return (count, try Self.aboveStandard(descriptors.prefix(descriptorCount)))
  }

  /// On failure all are closed.
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

  /// Waits until a message or the end has arrived.
  package func waitReadable(until deadline: Deadline) throws(Errno) {
    var item = pollfd(fd: rawValue, events: Int16(POLLIN), revents: 0)
    while poll(&item, 1, deadline.remainingMilliseconds) <= 0 {
      if deadline.hasPassed { throw Errno.timedOut }
    }
  }

  private static func withAddress(
    _ name: String, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32
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
    if result != 0 { throw Errno.current }
  }
}
