import MooncakeSystem

/// Warnings that outsiders can cause: one line a second at most, the next one says how many stayed
/// out. Used by one thread.
package struct RateLimitedLog: ~Copyable {
  private static let intervalNanoseconds: UInt64 = 1_000_000_000

  private var nextLine: UInt64 = 0
  private var suppressedCount = 0

  package init() {}

  package mutating func warning(_ message: @autoclosure () -> String) {
    let now = Clock.now()
    if now < nextLine {
      suppressedCount += 1
      return
    }
    nextLine = now &+ Self.intervalNanoseconds
    if suppressedCount > 0 {
      Log.warning("\(message()) (\(suppressedCount) similar lines left out)")
    } else {
      Log.warning(message())
    }
    suppressedCount = 0
  }
}
