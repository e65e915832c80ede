import CLinux
import Glibc

/// Numbers that order what one owner publishes, as Mooncake's releases from 0.3.14 on have them:
/// microseconds since 1970, each larger than the one before. Readers keep what they have if they
/// find an older one.
package struct MetadataVersion: Sendable {
  private var last: UInt64 = 0
  /// What others left there counts only up to so far ahead of this machine's clock: a day.
  private static let aheadMicroseconds: UInt64 = 86_400_000_000

  package init() {}

  /// A number larger than all before.
  package mutating func next() -> UInt64 {
    last = max(last + 1, Self.now())
    return last
  }

  /// Makes the numbers to come larger than one that another owner has used.
  package mutating func pass(_ other: UInt64) {
    if other <= Self.now() &+ Self.aheadMicroseconds { last = max(last, other) }
  }

  private static func now() -> UInt64 {
    var now = timespec()
    clock_gettime(CLOCK_REALTIME, &now)
    return UInt64(max(0, now.tv_sec)) &* 1_000_000 &+ UInt64(now.tv_nsec / 1000)
  }
}
