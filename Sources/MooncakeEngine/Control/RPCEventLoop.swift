import CLinux
import MooncakeSystem
import Synchronization

/// Shared by the RPC event loops: the descriptors their thread waits for, and an event by which
/// other threads wake or stop it.
final class RPCEventLoop: Sendable {
  let epoll: Epoll
  private let event: EventFD
  private let isStopping = Atomic(false)

  /// The event's token; other tokens are larger.
  static let wakeToken: UInt64 = 0
  private static let eventCount = 64
  private static let scratchBytes = 64 << 10

  init() throws(Errno) {
    epoll = try Epoll()
    event = try EventFD()
    try epoll.add(event.descriptor.rawValue, events: Epoll.readable, token: Self.wakeToken)
  }

  /// Makes the loop handle the wake token soon; from any thread.
  func wake() { event.signal() }

  /// Makes `run` return soon; from any thread.
  func requestStop() {
    isStopping.store(true, ordering: .releasing)
    event.signal()
  }

  /// Until a stop is requested: waits until `deadline` at most, calls `handle` with each event's
  /// token and scratch memory, then `afterEach`.
  func run(
    until deadline: () -> Deadline, _ handle: (UInt64, UnsafeMutableRawBufferPointer) -> Void,
    afterEach: () -> Void
  ) {
    let events = UnsafeMutableBufferPointer<epoll_event>.allocate(capacity: Self.eventCount)
    let scratch = UnsafeMutableRawBufferPointer.allocate(
      byteCount: Self.scratchBytes, alignment: 16)
    defer {
      events.deallocate()
      scratch.deallocate()
    }
    while !isStopping.load(ordering: .acquiring) {
      let count = epoll.wait(
        into: events, timeoutMilliseconds: deadline().remainingMilliseconds)
      for index in 0..<count {
        let token = events[index].data.u64
        if token == Self.wakeToken { event.clear() }
        handle(token, scratch)
      }
      afterEach()
    }
  }
}
