/// When a download looks for more holders in the metadata service.
struct Discovery: Sendable {
  private var isRunning = false
  private var count = 0
  private var nextTime: UInt64 = .max

  private static let pauseNanoseconds: UInt64 = 300_000_000
  private static let pauseDoublingLimit = 2

  /// Whether the metadata service has been asked and has not answered.
  var isUnderWay: Bool { isRunning }

  /// `isLimited`: living holders are known, so only a few lookups are worth their cost.
  func time(limit: Int, isLimited: Bool) -> UInt64 {
    isRunning || isLimited && count >= limit ? .max : nextTime
  }

  /// Nothing else is to be done: the first lookup may follow after a pause.
  mutating func schedule(_ now: UInt64) {
    if nextTime == .max { nextTime = now &+ Self.pauseNanoseconds }
  }

  mutating func begin(_ now: UInt64) {
    assert(!isRunning, "one lookup at a time")
    count += 1
    nextTime = now &+ Self.pauseNanoseconds << UInt64(min(count, Self.pauseDoublingLimit))
    isRunning = true
  }

  mutating func end() { isRunning = false }
}
