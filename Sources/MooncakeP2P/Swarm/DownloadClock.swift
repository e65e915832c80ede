/// When things last happened to a download. Time is passed in; nothing here reads a clock.
struct DownloadClock: Sendable {
  /// The latest time that was passed in.
  private(set) var now: UInt64 = 0
  /// When the download began, and when the latest bytes and the latest whole shard arrived; nil
  /// before the first action.
  private var start: UInt64?
  private(set) var lastByte: UInt64?
  private var lastShard: UInt64 = 0
  /// When a holder last answered, and when one last said that it serves others first.
  private var lastAnswer: UInt64 = 0
  private var lastBusyAnswer: UInt64 = 0

  mutating func advance(to time: UInt64) { now = time }

  /// The first action is due: waiting for bytes counts from here.
  mutating func begin() {
    if lastByte != nil { return }
    (lastByte, start) = (now, now)
  }

  mutating func noteBytes() { lastByte = now }

  mutating func noteShard() { (lastByte, lastShard) = (now, now) }

  mutating func noteAnswer(isBusy: Bool) {
    lastAnswer = now
    if isBusy { lastBusyAnswer = now }
  }

  /// Time without a whole shard.
  var nanosecondsWithoutShard: UInt64 {
    let since = max(lastShard, start ?? now)
    return now &- min(now, since)
  }

  /// When the download gives up if no byte arrives before.
  func giveUpTime(
    _ settings: DownloadPlan.Settings, isIsolated: Bool, knowsOnlyCorrupt: Bool
  ) -> UInt64 {
    guard let lastByte else { return .max }
    let latest = lastByte &+ settings.queuedNanoseconds
    let isolated =
      knowsOnlyCorrupt ? settings.corruptNanoseconds : settings.isolatedNanoseconds
    return min(
      latest,
      isIsolated
        ? max(lastByte, lastAnswer) &+ isolated
        : max(lastByte, lastBusyAnswer) &+ settings.starvedNanoseconds)
  }
}
