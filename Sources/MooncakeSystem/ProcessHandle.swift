import CLinux
import Glibc

/// Refers to a process without the risk that its number is reused.
package struct ProcessHandle: ~Copyable, Sendable {
  package let id: pid_t
  private let descriptor: FileDescriptor

  package init(_ id: pid_t) throws(Errno) {
    self.id = id
    descriptor = try FileDescriptor(opening: { linux_pidfd_open(id) }, call: "pidfd_open")
  }

  /// Becomes readable when the process has ended.
  package var rawDescriptor: Int32 { descriptor.rawValue }

  /// Whether the process has ended.
  package var hasEnded: Bool {
    var item = pollfd(fd: descriptor.rawValue, events: Int16(POLLIN), revents: 0)
    return poll(&item, 1, 0) > 0
  }

  /// Whether a thread of the process executes nothing: a signal stopped it, or it is gone. A
  /// stopped thread is never inside a system call; one held by a debugger may be, so it counts as
  /// running.
  package func isStopped(thread: pid_t) -> Bool {
    if !exists(thread: thread) { return true }
    guard
      let file = try? FileDescriptor.open("/proc/\(id)/task/\(thread)/stat", flags: O_RDONLY)
    else { return false }
    var bytes = [UInt8](repeating: 0, count: 512)
    let count = read(file.rawValue, &bytes, bytes.count)
    // "number (name) state": the name may contain any character.
    guard count > 0, let end = bytes[..<count].lastIndex(of: UInt8(ascii: ")")), end + 2 < count
    else { return false }
    return [UInt8(ascii: "T"), UInt8(ascii: "Z"), UInt8(ascii: "X")].contains(bytes[end + 2])
  }

  /// Whether the process has a thread with that number.
  package func exists(thread: pid_t) -> Bool { linux_thread_exists(id, thread) != 0 }
}
