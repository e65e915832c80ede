import CLinux
import Glibc

/// Owns an open file descriptor and closes it at the end of its life.
package struct FileDescriptor: ~Copyable, Sendable {
  package let rawValue: Int32

  /// Takes ownership of a valid descriptor.
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
    FileDescriptor(
      owning: try retryingInterrupts { Glibc.open(path, flags | O_CLOEXEC, mode) })
  }
}

/// A counter that other threads wait for through a descriptor.
package struct EventFD: ~Copyable, Sendable {
  package let descriptor: FileDescriptor

  package init() throws(Errno) {
    descriptor = FileDescriptor(
      owning: try retryingInterrupts { eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK)) })
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
