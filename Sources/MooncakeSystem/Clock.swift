import CLinux
import Glibc

/// Monotonic time.
package enum Clock {
  /// Nanoseconds since an arbitrary start. Should never go back, but in some virtual machines does.
  @inline(__always)
  package static func now() -> UInt64 {
    read(CLOCK_MONOTONIC)
  }

  /// Nanoseconds between two times of `now`; 0 if the clock went back in between.
  @inline(__always)
  package static func elapsed(since start: UInt64, until end: UInt64 = Clock.now()) -> UInt64 {
    end > start ? end &- start : 0
  }

  /// The same, but also counts time while the machine is suspended. Not comparable with `now`.
  package static func sinceBoot() -> UInt64 { read(CLOCK_BOOTTIME) }

  @inline(__always)
  private static func read(_ clock: clockid_t) -> UInt64 {
    var time = timespec()
    clock_gettime(clock, &time)
    return UInt64(bitPattern: Int64(time.tv_sec)) &* 1_000_000_000
      &+ UInt64(bitPattern: Int64(time.tv_nsec))
  }
}

/// The time of day, which may jump in either direction.
package enum WallClock {
  /// Milliseconds since 1970.
  package static func milliseconds() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    return UInt64(clamping: time.tv_sec) &* 1000 &+ UInt64(clamping: time.tv_nsec) / 1_000_000
  }
}

/// The point in monotonic time by which an operation must end.
public struct Deadline: Sendable, Comparable {
  /// Absolute, on `Clock`; `UInt64.max` means never.
  public let nanoseconds: UInt64

  @inlinable
  public init(nanoseconds: UInt64) { self.nanoseconds = nanoseconds }

  public static let never = Deadline(nanoseconds: .max)

  /// The given number of milliseconds from now; never, if that overflows.
  public static func after(milliseconds: UInt64) -> Deadline {
    let (span, overflow) = milliseconds.multipliedReportingOverflow(by: 1_000_000)
    if overflow { return .never }
    let (end, late) = Clock.now().addingReportingOverflow(span)
    return late ? .never : Deadline(nanoseconds: end)
  }

  @inlinable
  public static func < (left: Deadline, right: Deadline) -> Bool {
    left.nanoseconds < right.nanoseconds
  }

  package var hasPassed: Bool { nanoseconds != .max && Clock.now() >= nanoseconds }

  /// Time left, 0 once passed.
  package var remainingNanoseconds: UInt64 {
    if nanoseconds == .max { return .max }
    let now = Clock.now()
    return now >= nanoseconds ? 0 : nanoseconds - now
  }

  /// Time left as `poll` and `epoll_wait` want it: rounded up, -1 for never.
  package var remainingMilliseconds: Int32 {
    let left = remainingNanoseconds
    if left == .max { return -1 }
    return Int32(clamping: (left &+ 999_999) / 1_000_000)
  }

  /// As an absolute `timespec`; nil for never.
  package var timespecValue: timespec? {
    if nanoseconds == .max { return nil }
    return timespec(
      tv_sec: Int(nanoseconds / 1_000_000_000), tv_nsec: Int(nanoseconds % 1_000_000_000))
  }
}

/// Sleeps for much less than a second.
package func sleepBriefly(nanoseconds: UInt64) {
  var time = timespec(tv_sec: 0, tv_nsec: Int(min(nanoseconds, 999_999_999)))
  nanosleep(&time, nil)
}

/// Lets other threads that wait for this processor run.
package func yieldProcessor() { sched_yield() }
