import Glibc
import MooncakeP2P
import MooncakeSystem
import Synchronization

/// Notices SIGINT and SIGTERM. A second signal ends the program at once.
final class StopRequest: Sendable {
  private let flag = Atomic<Bool>(false)
  private let event: EventFD

  /// Canceled by the first signal; ends the operations that use it.
  let cancellation: Cancellation

  /// Create it before any thread is started: the signals are blocked here and handled by one
  /// thread.
  init() throws {
    event = try EventFD()
    cancellation = try Cancellation()
    var signals = sigset_t()
    sigemptyset(&signals)
    sigaddset(&signals, SIGINT)
    sigaddset(&signals, SIGTERM)
    pthread_sigmask(SIG_BLOCK, &signals, nil)
    try WorkerThread.startDetached(name: "signals") { [self] in watch() }
  }

  /// Readable once a stop is requested.
  var descriptor: Int32 { event.descriptor.rawValue }

  var isRequested: Bool { flag.load(ordering: .relaxed) }

  /// Sleeps until a stop is requested, the deadline passes or, if asked for, stdin ends or the
  /// reader of stdout has gone.
  func wait(until deadline: Deadline, orEndOfInput: Bool = false, orEndOfOutput: Bool = false) {
    var descriptors = [
      pollfd(fd: event.descriptor.rawValue, events: Int16(POLLIN), revents: 0),
      pollfd(fd: orEndOfInput ? STDIN_FILENO : -1, events: Int16(POLLIN), revents: 0),
      pollfd(fd: orEndOfOutput ? STDOUT_FILENO : -1, events: 0, revents: 0),
    ]
    while !isRequested && !deadline.hasPassed {
      // Writes elsewhere may fail meanwhile, so look regularly.
      let look = orEndOfOutput ? min(deadline, .after(milliseconds: 500)) : deadline
      let count = poll(&descriptors, nfds_t(descriptors.count), look.remainingMilliseconds)
      if orEndOfOutput && (Output.hasFailed || Output.isEnd(descriptors[2].revents)) {
        return
      }
      if count > 0 && descriptors[1].revents != 0 && inputHasEnded() { return }
    }
  }

  private func inputHasEnded() -> Bool {
    var bytes: (UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0)
    let count = withUnsafeMutableBytes(of: &bytes) { read(STDIN_FILENO, $0.baseAddress, $0.count) }
    return count == 0 || (count < 0 && errno != EINTR && errno != EAGAIN)
  }

  private func watch() {
    var signals = sigset_t()
    sigemptyset(&signals)
    sigaddset(&signals, SIGINT)
    sigaddset(&signals, SIGTERM)
    var number: Int32 = 0
    while true {
      if sigwait(&signals, &number) != 0 { continue }
      if flag.exchange(true, ordering: .relaxed) { _exit(128 + number) }
      event.signal()
      cancellation.cancel()
    }
  }
}
