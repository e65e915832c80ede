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
    let isDue = queue.isDue(request.reader, now: now)
    // Neither kind takes places of the other: those who read ranges come again and again.
    if isNaming {
      return isDue && readers.values.count(where: \.isNaming) < settings.extraReaders
    }
    if choosers.count >= settings.readerLimit { return false }
    // Nobody is kept waiting by less than half a reader.
    if isDue && usedPlaces(now) < Double(settings.readersAtOnce) - 0.5 { return true }
    return paces.pace(of: request.reader, now) == nil && mayTry(now)
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

  /// Those who have all places show nothing of how fast others would be, so once in a turn one
  /// more may try of which nothing is known, whoever has waited longer.
  private mutating func mayTry(_ now: UInt64) -> Bool {
    if now < nextTrial || !choosers.allSatisfy({ knownPace(of: $0, now) != nil }) { return false }
    nextTrial = now &+ settings.turnNanoseconds
    return true
  }

  // MARK: Pace

  /// A reader has read on. What it and the others read meanwhile is the least a link carries.
  mutating func measure(_ entry: Reader, _ reader: UInt64, _ now: UInt64) {
    let own = max(1, Double(now &- entry.since) / Double(entry.wholeCount))
    let sharing = readers.reduce(1.0) { sum, other in
      if other.key == reader { return sum }
      return sum + (isSettled(other.value, now) ? min(1, own / pace(of: other.value, now)) : 1)
    }
    let nanoseconds = own / sharing
    if let best, best.nanoseconds < nanoseconds, now &- best.time < Self.bestNanoseconds { return }
    best = (nanoseconds, now)
  }

  /// Nanoseconds a shard.
  private func pace(of reader: Reader, _ now: UInt64) -> Double {
    // It tells of what it has read when about half of what it was granted has come.
    let expected = reader.readCount + UInt64(max(1, reader.shards.count / 2))
    return max(1, Double(now &- reader.since) / Double(expected))
  }

  /// In this turn, or in the former one as long as this one says nothing.
  private func knownPace(of reader: Reader, _ now: UInt64) -> Double? {
    isSettled(reader, now) ? pace(of: reader, now) : reader.formerPace
  }

  /// Once it says something.
  mutating func rememberPace(of reader: UInt64, _ entry: Reader, _ now: UInt64) {
    if !entry.isNaming && isSettled(entry, now) {
      paces.remember(reader, pace(of: entry, now), now)
    }
  }

  private func usedPlaces(_ now: UInt64) -> Double {
    choosers.reduce(0) { $0 + part(of: $1, now) }
  }

  /// What it uses of a place: all, unless it is far behind a place's share of the link.
  private func part(of reader: Reader, _ now: UInt64) -> Double {
    guard let best, let pace = knownPace(of: reader, now) else { return 1 }
    let fair = best.nanoseconds * Double(settings.readersAtOnce)
    return pace <= fair * settings.slowFactor ? 1 : fair / pace
  }

  /// How long the busiest is remembered.
  private static let bestNanoseconds: UInt64 = 10_000_000_000
}
