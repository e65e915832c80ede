import CLinux
import Glibc

/// An epoll instance.
package struct Epoll: ~Copyable, Sendable {
  private let descriptor: FileDescriptor

  /// For waiting on the whole set as one descriptor: readable while any member is ready.
  package var rawValue: Int32 { descriptor.rawValue }

  package static let readable = EPOLLIN.rawValue
  package static let writable = EPOLLOUT.rawValue

  package init() throws(Errno) {
    let file = try FileDescriptor(
      opening: { epoll_create1(Int32(EPOLL_CLOEXEC)) }, call: "epoll_create1")
    // Fails here if waiting is forbidden: a thread whose waits fail at once would spin.
    let number = file.rawValue
    var event = epoll_event()
    _ = try retryingInterrupts("epoll_wait") { epoll_wait(number, &event, 1, 0) }
    descriptor = file
  }

  /// Starts watching a descriptor, level-triggered; `token` comes back with each event.
  package func add(_ target: Int32, events: UInt32, token: UInt64) throws(Errno) {
    try control(EPOLL_CTL_ADD, target, events, token)
  }

  /// Changes which events a descriptor is watched for.
  package func modify(_ target: Int32, events: UInt32, token: UInt64) throws(Errno) {
    try control(EPOLL_CTL_MOD, target, events, token)
  }

  package func remove(_ target: Int32) {
    var event = epoll_event()
    _ = epoll_ctl(descriptor.rawValue, EPOLL_CTL_DEL, target, &event)
  }

  /// Waits for events and returns how many were written; 0 if a signal interrupted the wait.
  package func wait(
    into events: UnsafeMutableBufferPointer<epoll_event>, timeoutMilliseconds: Int32
  ) -> Int {
    let count = epoll_wait(
      descriptor.rawValue, events.baseAddress, Int32(events.count), timeoutMilliseconds)
    return max(0, Int(count))
  }

  private func control(
    _ operation: Int32, _ target: Int32, _ events: UInt32, _ token: UInt64
  ) throws(Errno) {
    var event = epoll_event()
    event.events = events
    event.data.u64 = token
    if epoll_ctl(descriptor.rawValue, operation, target, &event) != 0 {
      throw Errno(errno, call: "epoll_ctl")
    }
  }
}
