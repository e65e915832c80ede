import CLinux
import Glibc

/// Owns an open file descriptor and closes it in `deinit`.
package struct FileDescriptor: ~Copyable, Sendable {
  package let rawValue: Int32

  /// Takes ownership of the descriptor that a system call returns; the call is repeated while
  /// signals interrupt it. Errors name the call if one is given.
  package init(opening body: () -> Int32, call: StaticString? = nil) throws(Errno) {
    rawValue = try Self.aboveStandard(try retryingInterrupts(call, body))
  }

  /// Takes ownership of a valid descriptor that has passed `aboveStandard`.
  package init(owning rawValue: Int32) {
    precondition(rawValue >= 0)
    self.rawValue = rawValue
  }

  deinit { _ = close(rawValue) }

  /// Gives the descriptor to the caller, who must close it.
  package consuming func release() -> Int32 {
    let descriptor = rawValue
    discard self
    return descriptor
  }

  /// Opens a path; always close-on-exec.
  package static func open(
    _ path: String, flags: Int32, mode: mode_t = 0o600
  ) throws(Errno) -> FileDescriptor {
    try FileDescriptor(opening: { Glibc.open(path, flags | O_CLOEXEC, mode) })
  }

  /// Opens a name in an open directory.
  package static func open(
    _ name: String, in directory: Int32, flags: Int32, mode: mode_t = 0o600
  ) throws(Errno) -> FileDescriptor {
    try FileDescriptor(opening: { openat(directory, name, flags | O_CLOEXEC, mode) })
  }

  /// Renumbers a descriptor that came out as 0, 1 or 2 because the host had closed those: anything
  /// that prints in this process would write into our socket. Closes it on failure.
  package static func aboveStandard(_ descriptor: Int32) throws(Errno) -> Int32 {
    if descriptor > STDERR_FILENO { return descriptor }
    let moved = fcntl(descriptor, F_DUPFD_CLOEXEC, STDERR_FILENO + 1)
    let error = Errno.current
    _ = Glibc.close(descriptor)
    if moved < 0 { throw error }
    return moved
  }

  /// Opens `/dev/null` for each of 0, 1 and 2 that is closed. Call it before calling a library that
  /// opens descriptors itself.
  package static func fillStandard() {
    for descriptor in STDIN_FILENO...STDERR_FILENO where fcntl(descriptor, F_GETFD) < 0 {
      let null = Glibc.open("/dev/null", O_RDWR | O_CLOEXEC)
      // Another thread has filled them meanwhile.
      if null > STDERR_FILENO { _ = Glibc.close(null) }
    }
  }
}

/// An event that other threads wait for through a descriptor.
package struct EventFD: ~Copyable, Sendable {
  package let descriptor: FileDescriptor

  package init() throws(Errno) {
    descriptor = try FileDescriptor(
      opening: { eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK)) }, call: "eventfd2")
  }

  /// Makes the descriptor readable.
  package func signal() {
    var one: UInt64 = 1
    // EAGAIN means the counter is at its maximum: readable already.
    _ = write(descriptor.rawValue, &one, 8)
  }

  /// Makes it unreadable until the next signal.
  package func clear() {
    var value: UInt64 = 0
    _ = read(descriptor.rawValue, &value, 8)
  }
}

extension EventFD {
  /// Gives the descriptor to the caller, who must close it.
  package consuming func keepOpen() -> Int32 { descriptor.release() }
}
