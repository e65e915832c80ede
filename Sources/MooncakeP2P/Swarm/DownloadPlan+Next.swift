extension DownloadPlan {
  /// What a neighbor is to be asked for.
  private enum Duty {
    /// Shards.
    case fetch
    /// A sign of life, as nothing arrives.
    case probe
    /// Nothing: to renew the lease, or to tell that grants are not used any more.
    case tell
  }

  /// What is to be done now; call until it returns nil.
  package mutating func next(_ now: UInt64) -> Action? {
    clock = now
    if lastByte == nil { (lastByte, firstTime) = (now, now) }
    if isOver { surrender() }
    // Each further turn has given up a stalled neighbor, and the number of these is bounded.
    while true {
      if !queue.isEmpty { return queue.removeFirst() }
      if isComplete || isOver { return nil }
      guard let index = stalledIndex else { break }
      if neighbors[index].probes < settings.probeLimit {
        neighbors[index].probes += 1
        return ask(index, limit: 0, timeoutMilliseconds: 400)
      }
      neighbors[index].isMute = true
      drop(index, Self.muteReason)
    }
    return nextQuestion() ?? move() ?? discover()
  }

  static let muteReason =
    "it answers and grants, but sends nothing: is its data port let through, and packets of full "
    + "size (MTU)?"

  /// A neighbor that owes bytes and has been silent for too long.
  private var stalledIndex: Int? {
    neighbors.indices.first { index in
      guard neighbors[index].readCount > 0,
        let (time, duty) = duty(of: neighbors[index], mayStart: false)
      else { return false }
      return duty == .probe && time <= clock
    }
  }

  private mutating func nextQuestion() -> Action? {
    var best: (index: Int, score: Double)?
    let mayStart = mayStart
    for index in neighbors.indices.reversed() {
      guard let (time, duty) = duty(of: neighbors[index], mayStart: mayStart), time <= clock else {
        continue
      }
      switch duty {
      case .probe: continue
      case .tell: return ask(index, limit: 0)
      case .fetch where neighbors[index].readCount > 0: return fetch(index)
      case .fetch:
        let score = score(of: neighbors[index])
        if score > best?.score ?? -1 { best = (index, score) }
      }
    }
    return best.map { fetch($0.index) }
  }

  /// When `next` shall be called again, if nothing is reported before.
  package var wakeTime: UInt64 {
    if !queue.isEmpty { return 0 }
    if isComplete { return .max }
    if isOver { return .max }
    var time = min(min(discoveryTime, moveTime), surrenderTime)
    let mayStart = mayStart
    for neighbor in neighbors {
      time = min(time, duty(of: neighbor, mayStart: mayStart)?.0 ?? .max)
      if untakenCount > 0, let lateTime = lateTime(of: neighbor), lateTime > clock {
        time = min(time, lateTime)
      }
    }
    return time
  }

  var untakenCount: Int { shardCount - taken.memberCount }

  /// Those that are read, or have been asked a moment ago. Who does not answer, or is far behind
  /// the fastest, keeps nobody else from being asked.
  private var activeCount: Int {
    let fastest = neighbors.reduce(0) { max($0, $1.speed ?? 0) }
    return neighbors.count { neighbor in
      neighbor.readCount > 0 && (neighbor.speed ?? fastest) >= fastest / Self.slowFactor
        || lateTime(of: neighbor).map { $0 > clock } ?? false
    }
  }

  /// Holders to ask or read at once: one more for each second without a whole shard, as those that
  /// are read show nothing of how fast others would be.
  private var holderLimit: Int {
    let since = max(lastWhole, firstTime ?? clock)
    let more = (clock &- min(clock, since)) / settings.trialNanoseconds
    return settings.holdersAtOnce + Int(min(more, UInt64(settings.holdersAtOnce)))
  }

  private static let slowFactor = 8.0

  /// When a question that is not answered is late.
  private func lateTime(of neighbor: Neighbor) -> UInt64? {
    neighbor.asked.map {
      $0.since &+ (reads.isEmpty ? settings.firstLateNanoseconds : settings.lateNanoseconds)
    }
  }

  /// Shards granted ahead by a holder: what arrives while the next question is answered.
  private func window(of neighbor: Neighbor) -> Int {
    let ahead = UInt64(min(neighbor.speed ?? 0, 1e12) * settings.windowSeconds)
    let bytes = max(settings.windowBytes, ahead)
    let limit = neighbor.isProven ? settings.windowShards : settings.unprovenShards
    return Int(min(UInt64(limit), max(2, bytes / shardBytes)))
  }

  /// Whether a holder may be asked from which nothing is read.
  private var mayStart: Bool { untakenCount > 0 && activeCount < holderLimit }

  private func duty(of neighbor: Neighbor, mayStart: Bool) -> (UInt64, Duty)? {
    if neighbor.isAsking || neighbor.isBanned || neighbor.isDropped { return nil }
    if neighbor.readCount > 0 {
      let wantsMore =
        untakenCount > 0 && neighbor.readCount <= window(of: neighbor) / 2 && neighbor.failures == 0
        && !isSlow(neighbor)
      let more = wantsMore ? neighbor.nextAsk : .max
      let stall = neighbor.stallTime
      if stall <= min(more, neighbor.renewal) { return (stall, .probe) }
      return more <= neighbor.renewal ? (more, .fetch) : (neighbor.renewal, .tell)
    }
    if mayStart && neighbor.nextAsk <= clock { return (neighbor.nextAsk, .fetch) }
    if neighbor.isOwedWord && neighbor.isAlive { return (0, .tell) }
    return mayStart ? (neighbor.nextAsk, .fetch) : nil
  }

  // MARK: Asking

  private mutating func ask(
    _ index: Int, limit: Int, wanted: Range<Int>? = nil, timeoutMilliseconds: UInt64 = 2000
  ) -> Action {
    var have = taken
    if let wanted { have.remove(wanted.lowerBound) }
    let holder = neighbors[index].address
    let reading = reads.filter { $0.value.holder == holder || $0.value.successor == holder }
    turn += 1
    let request = ShardRequest(
      holding: holder.holding, version: version, reader: reader, own: own, have: have,
      wanted: wanted, turn: turn, reading: Array(reading.keys), limit: limit)
    neighbors[index].isOwedWord = false
    neighbors[index].renewal = .max
    neighbors[index].asked = .init(limit: limit, moving: wanted?.lowerBound, since: clock)
    return .ask(neighbors[index].address, request, timeoutMilliseconds: timeoutMilliseconds)
  }

  /// Of the last shards each holder gets its share.
  private mutating func fetch(_ index: Int) -> Action {
    let share = max(1, untakenCount / settings.holdersAtOnce)
    let isReading = neighbors[index].readCount > 0
    return ask(
      index, limit: min(window(of: neighbors[index]) - neighbors[index].readCount, share),
      timeoutMilliseconds: isReading ? 400 : 2000)
  }

  /// Speed that a new reader may expect; the origin is left to those who find nobody else.
  private mutating func score(of neighbor: Neighbor) -> Double {
    let speed = neighbor.heldCount == 0 ? 1 : neighbor.speed ?? typicalSpeed
    let share = speed / Double(1 + neighbor.readerCount)
    let trust = neighbor.isKnown ? 2.0 : 1
    return share * (neighbor.isOrigin ? 0.5 : 1) * trust * (0.5 + 0.5 * random.unit())
  }

  private var typicalSpeed: Double {
    let speeds = neighbors.compactMap(\.speed)
    return speeds.isEmpty ? 1e9 : speeds.reduce(0, +) / Double(speeds.count)
  }

  /// Far behind the fastest: what it holds already may end, but it gets no more.
  private func isSlow(_ neighbor: Neighbor) -> Bool {
    guard let speed = neighbor.speed else { return false }
    return neighbors.contains { $0.readCount > 0 && $0.speed ?? 0 > speed * Self.slowFactor }
  }

  // MARK: The last shards

  private var moveTime: UInt64 { untakenCount == 0 && !reads.isEmpty ? nextMove : .max }

  /// Takes a shard from the holder that is expected to need longest for what it owes, if another
  /// needs less than half of that: asks that one for it, and only then cancels the first read.
  private mutating func move() -> Action? {
    if moveTime > clock { return nil }
    nextMove = clock &+ 50_000_000
    guard activeCount < settings.holdersAtOnce + 2,
      let (shard, left) = latestShard(),
      let index = neighbors.indices.filter({ isIdle(neighbors[$0]) })
        .max(by: { expectedSpeed(neighbors[$0]) < expectedSpeed(neighbors[$1]) })
    else { return nil }
    let needed = Double(shardBytes) / expectedSpeed(neighbors[index])
    if left < needed * 2 + 0.05 { return nil }
    return ask(index, limit: 1, wanted: shard..<(shard + 1))
  }

  private func isIdle(_ neighbor: Neighbor) -> Bool {
    neighbor.isAlive && !neighbor.isActive && neighbor.nextAsk <= clock && neighbor.heldCount != 0
  }

  private func expectedSpeed(_ neighbor: Neighbor) -> Double {
    max(1, neighbor.speed ?? typicalSpeed)
  }

  /// A movable shard of the holder with the longest way to go, and the seconds it has left.
  private func latestShard() -> (shard: Int, seconds: Double)? {
    var latest: (shard: Int, seconds: Double)?
    for neighbor in neighbors where neighbor.readCount > 0 {
      let silence = Double(clock &- min(clock, neighbor.lastCount)) * 1e-9
      let seconds = Double(neighbor.pendingBytes) / expectedSpeed(neighbor)
      let left = max(seconds, silence > 4 * seconds ? silence : 0)
      if left <= latest?.seconds ?? 0 { continue }
      let movable = reads.filter {
        $0.value.holder == neighbor.address && !$0.value.isCanceled
          && moves[$0.key, default: 0] < settings.moveLimit
      }
      if let shard = movable.keys.max() { latest = (shard, left) }
    }
    return latest
  }

  // MARK: More holders

  /// Starving, and few are known: among many, the holders themselves tell of others.
  private var discoveryTime: UInt64 {
    if isDiscovering || untakenCount == 0 { return .max }
    let living = holderCount
    if living == 0 { return reads.isEmpty ? nextDiscovery : .max }
    let isStarving = activeCount <= 1 && living < settings.neighborLimit / 2
    if !isStarving || discoveries >= settings.discoveryLimit { return .max }
    return nextDiscovery
  }

  private mutating func discover() -> Action? {
    if nextDiscovery == .max { nextDiscovery = clock &+ 300_000_000 }
    if discoveryTime > clock { return nil }
    discoveries += 1
    nextDiscovery = clock &+ 300_000_000 << UInt64(min(discoveries, 2))
    isDiscovering = true
    return .discover
  }
}
