import CLinux
import Glibc

/// Version numbers of an owner's publications, as Mooncake has them since 0.3.14: microseconds
/// since 1970, strictly increasing. Readers that find an older one keep what they have.
package struct MetadataVersion: Sendable {
  private var last: UInt64 = 0
  /// Other owners' versions count only up to this far ahead of our clock: one day.
  private static let aheadMicroseconds: UInt64 = 86_400_000_000

  package init() {}

  /// A number larger than all before it.
  package mutating func next() -> UInt64 {
    last = max(last + 1, Self.now())
    return last
  }

  /// Makes later numbers larger than one that another owner has used.
  package mutating func pass(_ other: UInt64) {
    if other <= Self.now() &+ Self.aheadMicroseconds { last = max(last, other) }
  }

  private static func now() -> UInt64 {
    var now = timespec()
    clock_gettime(CLOCK_REALTIME, &now)
    return UInt64(max(0, now.tv_sec)) &* 1_000_000 &+ UInt64(now.tv_nsec / 1000)
  }
}
