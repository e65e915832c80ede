/// What the state of a neighbor means for what it is asked, and for whether there is hope in it.
extension Neighbor {
  /// When its unanswered question is late; `isReading`: shards are read from some holder.
  func lateTime(_ settings: DownloadPlan.Settings, isReading: Bool) -> UInt64? {
    question.map {
      $0.since &+ (isReading ? settings.lateNanoseconds : settings.firstLateNanoseconds)
    }
  }

  /// Shards that it grants ahead: what arrives while the next question is answered.
  func window(_ settings: DownloadPlan.Settings, shardBytes: UInt64) -> Int {
    typealias Settings = DownloadPlan.Settings
    let ahead = UInt64(min(pace.speed ?? 0, Settings.speedLimit) * settings.windowSeconds)
    let bytes = max(settings.windowBytes, ahead)
    let limit = isProven ? settings.windowShardLimit : settings.unprovenShardLimit
    return Int(min(UInt64(limit), max(Settings.windowShardMinimum, bytes / shardBytes)))
  }

  /// Whether it may be asked at once to take over a shard.
  func isIdle(_ now: UInt64) -> Bool {
    isAlive && !isActive && nextAsk <= now && heldCount != 0
  }

  /// Whether a question to it is under way. A holder that sends its answer byte by byte is not
  /// waited for longer than for bytes.
  func isAwaited(_ now: UInt64, _ settings: DownloadPlan.Settings) -> Bool {
    guard let question else { return false }
    return now < question.since &+ settings.starvedNanoseconds
  }

  /// Whether it may have what is missing.
  func mayHelp(_ now: UInt64, _ settings: DownloadPlan.Settings, shardCount: Int) -> Bool {
    guard isAlive, !isSilent else { return false }
    guard let heldCount else {
      return question.map { now < $0.since &+ settings.sourcelessNanoseconds } ?? true
    }
    return heldCount >= shardCount || isBusy
  }
}
