/// A holder's side of the swarm: decides who may read which shards now.
///
/// The shard granted least often goes first, at random among equals, so an origin sends each shard
/// once before it sends any twice, and receivers that ask the same holder get different ones.
///
/// A receiver has its place for a turn: after that it gets no more grants while others wait. It may
/// finish reading what it was granted. A receiver that needs far longer for a shard than others
/// counts only for the part of a place that it uses, so slow receivers keep no fast ones away.
package struct UploadLedger: Sendable {
  /// Limits and times of a holder.
  package struct Settings: Sendable {
    /// Places: receivers that read at once. Others are told when to come again, and who else has
    /// the payload.
    package var placeLimit = 4
    /// Readers in all, however little of a place each of them needs.
    package var readerLimit = 64
    /// How long a receiver keeps its place while others wait.
    package var turnNanoseconds: UInt64 = 2_000_000_000
    /// A reader that is more than so many times slower than a place's share of the link counts as
    /// part of a reader.
    package var slowFactor = 4.0
    /// Waiting receivers whose order of arrival is remembered.
    package var waiterLimit = 64
    /// Additional places for receivers that name the shards they want: ranges, and the last shards
    /// of a download.
    package var namingReaderLimit = 4
    /// Shards granted to one reader at a time.
    package var grantLimit = 64
    package var leaseNanoseconds: UInt64 = 10_000_000_000
    package var peerLimit = 32
    /// Peers named in one answer.
    package var toldPeerLimit = 8
    /// Peers not heard of for so long are not named to others.
    package var peerNanoseconds: UInt64 = 30_000_000_000
    /// Refused receivers are told to come so late that about this many ask in a second.
    package var refusalsPerSecond: UInt64 = 500
    package var shortestRetryMilliseconds: UInt64 = 20
    package var longestRetryMilliseconds: UInt64 = 2000
    package var pausedRetryMilliseconds: UInt64 = 100

    package init() {}
  }

  /// A receiver with grants; each question renews the lease of all of them.
  private struct Reader {
    var shards: [Int] = []
    var expiry: UInt64 = 0
    /// Of the latest question.
    var turn: UInt64 = 0
    /// When it got its place, and the shards that it has read since.
    var since: UInt64
    var readCount: UInt64 = 0
    /// Whether it names the shards that it wants.
    var isNaming = false
    /// Nanoseconds a shard in its former turn.
    var formerPace: Double?
    /// How many of `shards`, from the first on, it has said that it is reading.
    var begunCount = 0
    /// Shards that it has read after it had said that it was reading them. It may also give back
    /// others unread, because another holder has granted them too.
    var wholeCount: UInt64 = 0
  }

  private let settings: Settings
  private var random: SwarmRandom
  /// How often each shard was granted.
  private var grantCounts: [UInt32]
  private var readers: [UInt64: Reader] = [:]
  private var peers = KnownPeers()
  private var refusals = RefusalRate()
  /// How fast those were that have no grants any more.
  private var paces = ReaderPaces()
  private var queue: UploadQueue
  /// Of receivers that name shards.
  private var namingQueue: UploadQueue
  /// Nanoseconds that the link needed for a shard when it was busiest lately, and when that was.
  private var best: (nanoseconds: Double, time: UInt64)?
  /// When one reader more may show whether it is faster than those that have all places.
  private var nextTrial: UInt64 = 0
  private var isWithdrawn = false
  /// While true, nothing is granted and no lease renewed.
  package var isPaused = false
  /// Shards that the latest request gave back: their reader has read them.
  package private(set) var returned: [Int] = []

  /// Nobody is kept waiting by less than half a reader.
  private static let ignoredPart = 0.5
  /// How long the link's busiest time is remembered.
  private static let bestNanoseconds: UInt64 = 10_000_000_000

  package init(shardCount: Int, seed: UInt64, settings: Settings = Settings()) {
    self.settings = settings
    random = SwarmRandom(seed: seed)
    queue = UploadQueue(limit: settings.waiterLimit)
    namingQueue = UploadQueue(limit: settings.waiterLimit)
    grantCounts = Array(repeating: 0, count: shardCount)
  }

  /// Answers a receiver. `available` are the shards that this holder has verified.
  package mutating func answer(
    _ request: ShardRequest, available: ShardSet, now: UInt64
  ) -> ShardAnswer {
    precondition(available.count == grantCounts.count)
    returned = []
    dropExpired(now)
    // The request is late, and nobody waits for its answer any more.
    if let reader = readers[request.reader], reader.turn >= request.turn {
      return ShardAnswer(state: .busy)
    }
    let former = readers[request.reader]
    keep(request, now)
    guard !isWithdrawn, request.have.count == grantCounts.count else {
      return ShardAnswer(state: .gone)
    }
    if isPaused {
      readers[request.reader]?.turn = request.turn
      return ShardAnswer(
        state: .busy, retryMilliseconds: settings.pausedRetryMilliseconds,
        heldCount: available.memberCount)
    }
    let isNew = former == nil
    var answer = ShardAnswer(
      state: .serving, leaseMilliseconds: settings.leaseNanoseconds / 1_000_000,
      heldCount: available.memberCount)
    if request.limit > 0 {
      if admits(request, former, now) {
        answer.granted = grant(request, former, available: available, now)
      } else {
        answer.state = .busy
      }
    }
    readers[request.reader]?.expiry = now &+ settings.leaseNanoseconds
    readers[request.reader]?.turn = request.turn
    if answer.granted.isEmpty {
      let retry = refusals.retryMilliseconds(
        isRefusal: request.limit > 0, perSecond: settings.refusalsPerSecond, now: now)
      answer.retryMilliseconds = min(
        settings.longestRetryMilliseconds, max(settings.shortestRetryMilliseconds, retry))
      let waits = answer.state == .busy && readers[request.reader] == nil
      if waits { wait(request, retryMilliseconds: answer.retryMilliseconds, now) }
    }
    answer.readerCount = readers.count
    // A receiver that is being served knows enough others already.
    if isNew || answer.granted.isEmpty {
      answer.peers = peers.some(
        except: request.own, limit: settings.toldPeerLimit, maximumAge: settings.peerNanoseconds,
        &random, now: now)
    }
    if let own = request.own {
      peers.remember(own, limit: settings.peerLimit, &random, now: now)
    }
    return answer
  }

  private mutating func wait(
    _ request: ShardRequest, retryMilliseconds: UInt64, _ now: UInt64
  ) {
    if request.wanted == nil {
      queue.add(request.reader, retryMilliseconds: retryMilliseconds, now: now)
    } else {
      namingQueue.add(request.reader, retryMilliseconds: retryMilliseconds, now: now)
    }
  }

  /// From now on every answer is `gone`, and no lease is renewed.
  package mutating func withdraw() { isWithdrawn = true }

  /// Grants neither given back nor expired.
  package mutating func outstandingCount(now: UInt64) -> Int {
    dropExpired(now)
    return readers.values.reduce(0) { $0 + $1.shards.count }
  }

  /// When the last grant expires, if none is given back; 0 without grants.
  package var lastExpiry: UInt64 { readers.values.reduce(0) { max($0, $1.expiry) } }

  private mutating func dropExpired(_ now: UInt64) {
    queue.dropExpired(now)
    namingQueue.dropExpired(now)
    for (reader, entry) in readers where entry.expiry <= now {
      rememberPace(of: reader, entry, now)
      readers[reader] = nil
    }
  }

  /// Keeps the grants that the receiver says it is reading, and takes the others back.
  private mutating func keep(_ request: ShardRequest, _ now: UInt64) {
    guard var entry = readers[request.reader] else { return }
    let begun = entry.shards.prefix(entry.begunCount)
    returned = entry.shards.filter { !request.reading.contains($0) }
    entry.shards.removeAll { !request.reading.contains($0) }
    // A receiver that reads a range does not say which shards it has.
    if request.wanted == nil && request.have.count == grantCounts.count {
      let read = returned.filter { request.have.contains($0) }
      entry.readCount += UInt64(read.count)
      let whole = read.count { begun.contains($0) }
      entry.wholeCount += UInt64(whole)
      if whole > 0 { measure(entry, request.reader, now) }
    }
    entry.begunCount = entry.shards.count
    rememberPace(of: request.reader, entry, now)
    readers[request.reader] = entry.shards.isEmpty ? nil : entry
  }

  private mutating func grant(
    _ request: ShardRequest, _ former: Reader?, available: ShardSet, _ now: UInt64
  ) -> [Int] {
    // It was admitted, so it no longer waits, whether there is anything for it or not.
    let isNaming = request.wanted != nil
    if isNaming { namingQueue.remove(request.reader) } else { queue.remove(request.reader) }
    var reader = readers[request.reader] ?? Reader(since: now, isNaming: isNaming)
    reader.isNaming = reader.isNaming && isNaming
    if reader.shards.isEmpty { reader.formerPace = paces.pace(of: request.reader, now) }
    if let former, reader.shards.isEmpty, !isTurnOver(former, now) {
      (reader.since, reader.readCount, reader.wholeCount) = (
        former.since, former.readCount, former.wholeCount
      )
    }
    let limit = min(request.limit, settings.grantLimit - reader.shards.count)
    let granted = choose(limit: limit, request, available: available)
    if granted.isEmpty { return [] }
    assert(Set(granted).count == granted.count, "a shard is granted twice at once")
    assert(granted.allSatisfy { available.contains($0) }, "a shard is granted that is not here")
    for shard in granted { grantCounts[shard] &+= 1 }
    reader.shards += granted
    readers[request.reader] = reader
    return granted
  }

  /// Chooses in one pass over the candidates, keeping the best few, best first.
  private mutating func choose(
    limit: Int, _ request: ShardRequest, available: ShardSet
  ) -> [Int] {
    if limit <= 0 { return [] }
    var best: [(key: UInt64, shard: Int)] = []
    var random = random
    available.forEach(notIn: request.have) { shard in
      if let wanted = request.wanted {
        if shard >= wanted.upperBound { return false }
        if shard < wanted.lowerBound { return true }
      }
      let key = UInt64(grantCounts[shard]) << 32 | random.next() >> 32
      if best.count == limit && key >= best[limit - 1].key { return true }
      if best.count == limit { best.removeLast() }
      best.insert((key, shard), at: best.firstIndex { $0.key > key } ?? best.count)
      return true
    }
    self.random = random
    return best.map(\.shard)
  }

  // MARK: Places: who gets one, and for how long

  private mutating func admits(_ request: ShardRequest, _ former: Reader?, _ now: UInt64) -> Bool {
    let isNaming = request.wanted != nil
    let queue = isNaming ? namingQueue : queue
    if let former, former.isNaming == isNaming {
      // Its turn ends only if others wait.
      if queue.isEmpty || !isTurnOver(former, now) { return true }
      if readers[request.reader] != nil { return false }
    }
    let isDue = queue.isDue(request.reader, now: now)
    // Neither kind takes places of the other: receivers that read ranges come again and again.
    if isNaming {
      return isDue && readers.values.count(where: \.isNaming) < settings.namingReaderLimit
    }
    if choosers.count >= settings.readerLimit { return false }
    if isDue && usedPlaces(now) < Double(settings.placeLimit) - Self.ignoredPart { return true }
    return paces.pace(of: request.reader, now) == nil && mayTry(now)
  }

  /// Readers for which the holder chooses shards.
  private var choosers: [Reader] { readers.values.filter { !$0.isNaming } }

  private func isTurnOver(_ reader: Reader, _ now: UInt64) -> Bool {
    now &- reader.since >= settings.turnNanoseconds
  }

  /// Whether it has read for long enough for its pace to mean something.
  private func isSettled(_ reader: Reader, _ now: UInt64) -> Bool {
    now &- reader.since >= settings.turnNanoseconds / 2
  }

  /// The readers that have all places say nothing about how fast others would be. So once in a turn
  /// one more of unknown pace may try, even if another has waited longer.
  private mutating func mayTry(_ now: UInt64) -> Bool {
    if now < nextTrial || !choosers.allSatisfy({ knownPace(of: $0, now) != nil }) { return false }
    nextTrial = now &+ settings.turnNanoseconds
    return true
  }

  // MARK: Pace

  /// A reader has read more. What it and the others read meanwhile is the least that the link
  /// carries.
  private mutating func measure(_ entry: Reader, _ reader: UInt64, _ now: UInt64) {
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
    // It reports what it has read when about half of what it was granted has arrived.
    let expected = reader.readCount + UInt64(max(1, reader.shards.count / 2))
    return max(1, Double(now &- reader.since) / Double(expected))
  }

  /// In this turn, or in the former one as long as this one is too short to tell.
  private func knownPace(of reader: Reader, _ now: UInt64) -> Double? {
    isSettled(reader, now) ? pace(of: reader, now) : reader.formerPace
  }

  /// Once the turn is long enough to tell.
  private mutating func rememberPace(of reader: UInt64, _ entry: Reader, _ now: UInt64) {
    if !entry.isNaming && isSettled(entry, now) {
      paces.remember(reader, pace(of: entry, now), now)
    }
  }

  private func usedPlaces(_ now: UInt64) -> Double {
    choosers.reduce(0) { $0 + part(of: $1, now) }
  }

  /// How much of a place it uses: all, unless it is far behind a place's share of the link.
  private func part(of reader: Reader, _ now: UInt64) -> Double {
    guard let best, let pace = knownPace(of: reader, now) else { return 1 }
    let fair = best.nanoseconds * Double(settings.placeLimit)
    return pace <= fair * settings.slowFactor ? 1 : fair / pace
  }
}
