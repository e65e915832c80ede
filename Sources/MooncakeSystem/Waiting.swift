import CLinux
import Glibc

/// Sleeping that can be interrupted.
package enum Waiting {
  /// Sleeps until the deadline; returns true as soon as the descriptor is readable.
  package static func sleep(until deadline: Deadline, cancellation: Int32) -> Bool {
    var item = pollfd(fd: cancellation, events: Int16(POLLIN), revents: 0)
    while !deadline.hasPassed {
      if poll(&item, 1, deadline.remainingMilliseconds) > 0 { return true }
    }
    return false
  }

  /// Whether a descriptor is readable now; false for none, -1.
  package static func isReadable(_ descriptor: Int32) -> Bool {
    if descriptor < 0 { return false }
    var item = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
    return poll(&item, 1, 0) > 0
  }
}
