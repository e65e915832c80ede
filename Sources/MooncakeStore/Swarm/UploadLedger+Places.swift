/// Who gets a place, and for how long.
extension UploadLedger {
  mutating func admits(_ request: ShardRequest, _ former: Reader?, _ now: UInt64) -> Bool {
    let isNaming = request.wanted != nil
    let queue = isNaming ? namingQueue : queue
    if let former, former.isNaming == isNaming {
      // Its turn is over only where others wait.
      if queue.isEmpty || !isTurnOver(former, now) { return true }
      if readers[request.reader] != nil { return false }
    }
    if !queue.isDue(request.reader, now: now) { return false }
    // Neither kind takes places of the other: those who read ranges come again and again.
    if isNaming { return readers.values.count(where: \.isNaming) < settings.extraReaders }
    if choosers.count >= settings.readerLimit { return false }
    // Nobody is kept waiting by less than half a reader.
    return usedPlaces(now) < Double(settings.readersAtOnce) - 0.5 || mayTry(now)
  }

  /// Those for whom the holder chooses shards.
  private var choosers: [Reader] { readers.values.filter { !$0.isNaming } }

  func isTurnOver(_ reader: Reader, _ now: UInt64) -> Bool {
    now &- reader.since >= settings.turnNanoseconds
  }

  /// Whether its pace says something.
  private func isSettled(_ reader: Reader, _ now: UInt64) -> Bool {
    now &- reader.since >= settings.turnNanoseconds / 2
  }

  /// Those who have all places show nothing of how fast others would be, so after a while one more
  /// may try: the less often, the longer none of these was faster.
  private mutating func mayTry(_ now: UInt64) -> Bool {
    if now < nextTrial || !choosers.allSatisfy({ isSettled($0, now) }) { return false }
    trialPause = min(max(settings.turnNanoseconds, trialPause * 2), 4 * settings.turnNanoseconds)
    nextTrial = now &+ trialPause
    return true
  }

  // MARK: Pace

  mutating func measure(_ pace: UInt64, _ now: UInt64) {
    if let best, best.pace < pace, now &- best.time < Self.bestNanoseconds { return }
    if let best, pace < best.pace / settings.slowFactor { trialPause = 0 }
    best = (max(1, pace), now)
  }

  private func usedPlaces(_ now: UInt64) -> Double {
    choosers.reduce(0) { $0 + part(of: $1, now) }
  }

  /// What it uses of a place: all, unless it is far behind the fastest.
  private func part(of reader: Reader, _ now: UInt64) -> Double {
    guard let best, isSettled(reader, now) else { return 1 }
    // It tells of what it has read when about half of what it was granted has come.
    let expected = reader.readCount + UInt64(max(1, reader.shards.count / 2))
    let pace = (now &- reader.since) / expected
    return pace / settings.slowFactor <= best.pace ? 1 : Double(best.pace) / Double(pace)
  }

  /// How long the fastest is remembered.
  private static let bestNanoseconds: UInt64 = 10_000_000_000
}
