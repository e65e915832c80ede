/// A receiver's side of the swarm: decides which holder to ask for shards, and when a holder has
/// failed.
///
/// The holders choose which shards it gets. It keeps a bounded number of neighbors, reads from a
/// few of them at once, asks each again before its grants are used up, and asks others for what a
/// dead or corrupt one has not delivered. No shard is ever read twice at the same time, because
/// both reads would write to the same memory.
package struct DownloadPlan: Sendable {
  package enum Action: Equatable, Sendable {
    /// Send it; report with `answered` or `askFailed`.
    case ask(HolderAddress, ShardRequest, timeoutMilliseconds: UInt64)
    /// Read it; report with `progressed`, then `finished` or `failed`.
    case read(HolderAddress, shard: Int)
    /// End this read early; report how it ended as usual.
    case cancel(HolderAddress, shard: Int)
    /// Tell a holder that was given up that nothing is read from it any more; report nothing.
    case leave(HolderAddress, ShardRequest)
    /// Look for more holders in the metadata service; `add` them, then report with `discovered`.
    case discover
  }

  /// What a neighbor is asked for.
  private enum Purpose {
    case shards
    /// A sign of life, because nothing arrives.
    case probe
    /// Nothing: renews the lease, or says that grants are not used any more.
    case update
  }

  private let settings: Settings
  private let version: PayloadVersion
  private let own: HolderAddress?
  private let reader: UInt64
  private var random: SwarmRandom
  private var clock = DownloadClock()
  private var shards: DownloadShards
  private var neighbors = Neighborhood()
  private var failures = FailedHolders()
  private var discovery = Discovery()
  private var queue: [Action] = []
  /// Holders that were given up and whose reads have not all ended.
  private var leaving: [HolderAddress] = []
  /// Number of the latest question.
  private var turn: UInt64 = 0
  private var nextMove: UInt64 = 0

  /// `own` is told to others as a holder of what is verified; nil offers nothing. `have` is already
  /// there.
  package init(
    shardCount: Int, shardBytes: UInt64, version: PayloadVersion, own: HolderAddress?,
    reader: UInt64, seed: UInt64, have: ShardSet? = nil, settings: Settings = Settings()
  ) {
    self.settings = settings
    self.version = version
    self.own = own
    self.reader = reader
    random = SwarmRandom(seed: seed)
    shards = DownloadShards(count: shardCount, shardBytes: shardBytes, have: have)
  }

  package var verified: ShardSet { shards.verified }
  package var isComplete: Bool { shards.isComplete }
  package var missingCount: Int { shards.missingCount }
  package var holderCount: Int { neighbors.livingCount }
  /// Holders that failed and why, the latest failure of each.
  package var tried: [(holder: HolderAddress, reason: String)] { failures.tried }
  package var corruptShardCount: Int { failures.corruptShardCount }
  /// Who sent a shard with wrong bytes, and the first such shard of each.
  package var corrupt: [(holder: HolderAddress, shard: Int)] { failures.corrupt }
  package func isOrigin(_ holder: HolderAddress) -> Bool { neighbors.isOrigin(holder) }

  /// Holders that may count grants of this receiver: they are told when the download ends.
  package var holdersWithGrants: [HolderAddress] {
    let told = queue.compactMap { action in
      if case .leave(let holder, _) = action { holder } else { nil }
    }
    return neighbors.filter { $0.hasUnusedGrants || $0.isActive }.map(\.address) + leaving + told
  }

  /// Holders that may be asked, read or told something.
  package var known: [HolderAddress] { neighbors.map(\.address) + holdersWithGrants }

  /// Living holders that have nothing of what is missing.
  package var useless: [HolderAddress] {
    neighbors.filter {
      $0.isAlive && !$0.isSilent && $0.heldCount != nil && !$0.isActive
    }.map(\.address)
  }

  // MARK: Holders

  /// Takes a holder as a neighbor or, if there are enough, as one to turn to later.
  package mutating func add(_ holder: HolderAddress, isOrigin: Bool) {
    if holder.holding == own?.holding { return }
    if isOrigin { neighbors.markOrigin(holder) }
    if !neighbors.mayAdd(holder, now: clock.now) { return }
    // What was read from it before it was given up must have ended.
    if shards.isReading(holding: holder.holding) { return }
    neighbors.add(holder, isOrigin: isOrigin, settings, &random)
  }

  /// Says, before the first question, whether the holder has answered another one. Holders that
  /// have not are asked after the others.
  package mutating func expect(_ holder: HolderAddress, answers: Bool, now: UInt64) {
    guard let index = neighbors.index(of: holder) else { return }
    if answers {
      neighbors[index].expectAnswer()
    } else {
      neighbors[index].setNextAsk(now &+ settings.lateNanoseconds)
    }
  }

  /// The holders that `discover` found have been added.
  package mutating func discovered(now: UInt64) {
    clock.advance(to: now)
    discovery.end()
  }

  // MARK: Answers

  package mutating func answered(by holder: HolderAddress, _ answer: ShardAnswer, now: UInt64) {
    clock.advance(to: now)
    for peer in answer.peers { add(peer, isOrigin: false) }
    guard let index = neighbors.index(of: holder) else {
      // It was given up while it answered, so nobody reads what it grants.
      if !answer.granted.isEmpty && neighbors.isAvoided(holder) { leave(holder) }
      return
    }
    guard let question = neighbors[index].endQuestion() else { return }
    if answer.state == .gone {
      failures.recordGone(holder)
      drop(index, "holds it no longer")
      return
    }
    clock.noteAnswer(isBusy: answer.state == .busy)
    neighbors[index].noteAnswer(answer)
    if neighbors[index].isDropped {
      neighbors[index].noteUnusedGrants()
      return
    }
    neighbors[index].accept(leaseMilliseconds: answer.leaseMilliseconds, now: now)
    failures.recordPresent(holder)
    if !neighbors[index].isSilent { failures.forget(holder) }
    var isUseful = false
    // Grants beyond what was asked for are ignored: answering them would only bring more.
    for shard in answer.granted.prefix(question.limit) {
      if accept(shard, from: index, moving: question.moving) {
        isUseful = true
      } else {
        neighbors[index].noteUnusedGrants()
      }
    }
    if isUseful {
      neighbors[index].noteGrant()
    } else if question.limit > 0 {
      refused(index, retryMilliseconds: answer.retryMilliseconds)
    }
  }

  /// `isGone`: the holder's process lives but no longer has this payload. A question may get lost:
  /// if bytes have come since, the holder works.
  package mutating func askFailed(
    _ holder: HolderAddress, reason: String, isGone: Bool, now: UInt64
  ) {
    clock.advance(to: now)
    guard let index = neighbors.index(of: holder) else { return }
    let question = neighbors[index].endQuestion()
    let sends =
      neighbors[index].isReading
      && neighbors[index].pace.hasProgressed(since: question?.since ?? .max)
    if isGone { failures.recordGone(holder) }
    if isGone || !sends { return drop(index, reason) }
    neighbors[index].askAgain(at: pauseEnd(milliseconds: Settings.retryMilliseconds))
  }

  /// Uses a grant; returns false if it is of no use.
  private mutating func accept(_ shard: Int, from index: Int, moving: Int?) -> Bool {
    guard shards.contains(shard) else { return false }
    if !shards.taken.contains(shard) {
      begin(shard, from: index)
      return true
    }
    guard moving == shard, let former = shards.move(shard, to: neighbors[index].address)
    else { return false }
    queue.append(.cancel(former, shard: shard))
    return true
  }

  private mutating func begin(_ shard: Int, from index: Int) {
    shards.begin(shard, from: neighbors[index].address)
    neighbors[index].beginRead(shards.shardBytes, now: clock.now)
    queue.append(.read(neighbors[index].address, shard: shard))
  }

  /// Asks again later. A holder that refuses time and again makes room for another one.
  private mutating func refused(_ index: Int, retryMilliseconds: UInt64) {
    neighbors[index].noteRefusal()
    let refusals = neighbors[index].refusals
    let patience =
      Settings.refusalMilliseconds << UInt64(min(refusals - 1, Settings.refusalDoublingLimit))
    pause(
      index, milliseconds: max(patience, min(retryMilliseconds, Settings.refusalLimitMilliseconds)))
    if refusals < Settings.refusalLimit || neighbors[index].isOrigin || neighbors[index].isActive {
      return
    }
    if neighbors[index].hasUnusedGrants { return }
    neighbors.exchange(index, refusals: Settings.refusalLimit - 1, &random)
  }

  private mutating func pause(_ index: Int, milliseconds: UInt64) {
    neighbors[index].setNextAsk(pauseEnd(milliseconds: milliseconds))
  }

  private mutating func pauseEnd(milliseconds: UInt64) -> UInt64 {
    let factor = Settings.pauseFactor.least + Settings.pauseFactor.spread * random.unit()
    return clock.now &+ UInt64(Double(milliseconds) * 1e6 * factor)
  }

  // MARK: Reads

  /// Bytes of shards have arrived; those of a finished shard need not be reported. 0: bytes arrive,
  /// but cannot be counted yet.
  package mutating func progressed(_ holder: HolderAddress, bytes: UInt64, now: UInt64) {
    clock.advance(to: now)
    guard let index = neighbors.index(of: holder), neighbors[index].isReading else { return }
    neighbors[index].progress(bytes, now: now)
    noteBytes(from: index)
  }

  private mutating func noteBytes(from index: Int) {
    clock.noteBytes()
    if neighbors[index].noteBytes() { failures.forget(neighbors[index].address) }
  }

  /// A shard has arrived. Returns whether it is intact and was missing.
  @discardableResult
  package mutating func finished(
    _ shard: Int, from holder: HolderAddress, isIntact: Bool, now: UInt64
  ) -> Bool {
    clock.advance(to: now)
    guard let read = endRead(shard, holder, isWhole: true) else { return false }
    if isIntact {
      // It was faster than the holder that was to take over.
      if let successor = read.successor, let index = neighbors.index(of: successor) {
        neighbors[index].noteUnusedGrants()
      }
      shards.verify(shard)
      clock.noteShard()
      if let index = neighbors.index(of: holder) {
        neighbors[index].noteCorrectShard()
        noteBytes(from: index)
      }
      return true
    }
    failures.recordCorruptShard(shard, from: holder)
    release(shard, read)
    if let index = neighbors.index(of: holder) {
      drop(index, "sent shard \(shard) with a wrong digest", isForever: true)
    }
    return false
  }

  /// A read has ended without its bytes, also when the plan canceled it.
  package mutating func failed(
    _ shard: Int, from holder: HolderAddress, reason: String, isDead: Bool, now: UInt64
  ) {
    clock.advance(to: now)
    guard let read = endRead(shard, holder, isWhole: false) else { return }
    release(shard, read)
    if read.isCanceled { return }
    guard let index = neighbors.index(of: holder) else { return }
    neighbors[index].noteFailure()
    if isDead || neighbors[index].failures >= Settings.failureLimit {
      drop(index, reason)
    } else {
      pause(index, milliseconds: Settings.retryMilliseconds)
    }
  }

  private mutating func endRead(
    _ shard: Int, _ holder: HolderAddress, isWhole: Bool
  ) -> DownloadShards.Read? {
    guard let read = shards.endRead(shard, from: holder) else { return nil }
    if let index = neighbors.index(of: holder), neighbors[index].isReading {
      neighbors[index].endRead(shards.shardBytes, isWhole: isWhole, now: clock.now)
      assert(
        neighbors[index].pace.readCount == shards.readCount(from: neighbors[index].address),
        "the reads of a neighbor are miscounted")
    }
    if let place = leaving.firstIndex(where: { $0.holding == holder.holding }) {
      leaving.remove(at: place)
      leave(holder)
    }
    return read
  }

  /// The shard is missing again, or is read from the holder that stands ready.
  private mutating func release(_ shard: Int, _ read: DownloadShards.Read) {
    if let successor = read.successor, let index = neighbors.index(of: successor) {
      begin(shard, from: index)
    } else {
      shards.release(shard)
    }
  }

  // MARK: Failure

  /// Ends what is read from a holder and does without it, for a while or forever. An origin stays a
  /// neighbor, to be tried again. Others are told, so that they have room for other receivers.
  private mutating func drop(_ index: Int, _ reason: String, isForever: Bool = false) {
    let holder = neighbors[index].address
    failures.record(holder, reason)
    cancelReads(from: holder)
    shards.removeSuccessor(holder)
    neighbors[index].noteFailure()
    if neighbors[index].isOrigin {
      if isForever { neighbors[index].ban() }
      neighbors[index].drop()
      if neighbors[index].isBanned { leave(holder) }
      let doublings = UInt64(min(neighbors[index].failures, Settings.retryDoublingLimit))
      pause(
        index,
        milliseconds: min(Settings.retryLimitMilliseconds, Settings.retryMilliseconds << doublings))
      return
    }
    let mayHaveGrants = neighbors[index].isAsking || neighbors[index].heldCount != nil
    neighbors.remove(at: index)
    if mayHaveGrants { leave(holder) }
    neighbors.avoid(holder, isForever: isForever, now: clock.now)
    if let other = neighbors.takeCandidate() { add(other, isOrigin: false) }
  }

  private mutating func cancelReads(from holder: HolderAddress) {
    for shard in shards.cancelReads(from: holder) { queue.append(.cancel(holder, shard: shard)) }
  }

  /// Tells a holder that nothing is read from it any more, once all reads from it have ended.
  private mutating func leave(_ holder: HolderAddress) {
    if shards.isReading(from: holder) {
      if !leaving.contains(holder) { leaving.append(holder) }
      return
    }
    turn += 1
    queue.append(
      .leave(
        holder,
        ShardRequest(
          holding: holder.holding, version: version, reader: reader, own: nil,
          have: ShardSet(count: shards.count), turn: turn, reading: [], limit: 0)))
  }

  // MARK: What to do next

  /// What is to be done now; call until it returns nil.
  package mutating func next(_ now: UInt64) -> Action? {
    clock.advance(to: now)
    clock.begin()
    if isOver { giveUp() }
    // Each further round has given up a stalled neighbor, and the number of these is bounded.
    while true {
      if !queue.isEmpty { return queue.removeFirst() }
      if isComplete || isOver { return nil }
      guard let index = stalledIndex else { break }
      if neighbors[index].pace.probeCount < settings.probeLimit {
        neighbors[index].noteProbe()
        return ask(
          index, limit: 0, timeoutMilliseconds: Settings.readingQuestionMilliseconds)
      }
      neighbors[index].noteSilence()
      drop(index, Self.silenceReason)
    }
    return nextQuestion() ?? move() ?? discover()
  }

  private static let silenceReason =
    "it answers and grants, but sends nothing: is its data port let through, and packets of full "
    + "size (MTU)?"

  /// A neighbor that owes bytes and has been silent for too long.
  private var stalledIndex: Int? {
    neighbors.indices.first { index in
      guard neighbors[index].isReading,
        let (time, purpose) = nextQuestion(to: neighbors[index], mayStart: false)
      else { return false }
      return purpose == .probe && time <= clock.now
    }
  }

  private mutating func nextQuestion() -> Action? {
    var best: (index: Int, score: Double)?
    let mayStart = mayStart
    for index in neighbors.indices.reversed() {
      guard let (time, purpose) = nextQuestion(to: neighbors[index], mayStart: mayStart),
        time <= clock.now
      else { continue }
      switch purpose {
      case .probe: continue
      case .update: return ask(index, limit: 0)
      case .shards where neighbors[index].isReading: return askForShards(index)
      case .shards:
        let score = neighbors.score(of: neighbors[index], &random)
        if score > best?.score ?? -1 { best = (index, score) }
      }
    }
    return best.map { askForShards($0.index) }
  }

  /// When `next` must be called again if nothing is reported before.
  package var wakeTime: UInt64 {
    if !queue.isEmpty { return 0 }
    if isComplete || isOver { return .max }
    var time = min(min(discoveryTime, moveTime), giveUpTime)
    let mayStart = mayStart
    for neighbor in neighbors {
      time = min(time, nextQuestion(to: neighbor, mayStart: mayStart)?.time ?? .max)
      if shards.untakenCount > 0,
        let lateTime = neighbor.lateTime(settings, isReading: shards.isReading),
        lateTime > clock.now
      {
        time = min(time, lateTime)
      }
    }
    return time
  }

  private var activeCount: Int {
    neighbors.activeCount { neighbor in
      neighbor.lateTime(settings, isReading: shards.isReading).map { $0 > clock.now } ?? false
    }
  }

  /// Holders to ask or read at once: one more for each second without a whole shard, because those
  /// that are read say nothing about how fast others would be.
  private var holderLimit: Int {
    let more = clock.nanosecondsWithoutShard / settings.trialNanoseconds
    return settings.activeHolderLimit + Int(min(more, UInt64(settings.activeHolderLimit)))
  }

  /// Whether a holder may be asked from which nothing is read.
  private var mayStart: Bool { shards.untakenCount > 0 && activeCount < holderLimit }

  /// What a neighbor is asked for next, and when; nil if nothing.
  private func nextQuestion(
    to neighbor: Neighbor, mayStart: Bool
  ) -> (time: UInt64, purpose: Purpose)? {
    if neighbor.isAsking || neighbor.isBanned || neighbor.isDropped { return nil }
    if neighbor.isReading {
      let wantsMore =
        shards.untakenCount > 0
        && neighbor.pace.readCount <= neighbor.window(settings, shardBytes: shards.shardBytes) / 2
        && neighbor.failures == 0 && !neighbors.isSlow(neighbor)
      let more = wantsMore ? neighbor.nextAsk : .max
      let stall = neighbor.pace.stallTime
      if stall <= min(more, neighbor.renewal) { return (stall, .probe) }
      return more <= neighbor.renewal ? (more, .shards) : (neighbor.renewal, .update)
    }
    if mayStart && neighbor.nextAsk <= clock.now { return (neighbor.nextAsk, .shards) }
    if neighbor.hasUnusedGrants && neighbor.isAlive { return (0, .update) }
    return mayStart ? (neighbor.nextAsk, .shards) : nil
  }

  // MARK: Asking

  private mutating func ask(
    _ index: Int, limit: Int, wanted: Range<Int>? = nil,
    timeoutMilliseconds: UInt64 = Settings.questionMilliseconds
  ) -> Action {
    var have = shards.taken
    if let wanted { have.remove(wanted.lowerBound) }
    let holder = neighbors[index].address
    turn += 1
    let request = ShardRequest(
      holding: holder.holding, version: version, reader: reader, own: own, have: have,
      wanted: wanted, turn: turn, reading: shards.claims(on: holder), limit: limit)
    neighbors[index].beginQuestion(limit: limit, moving: wanted?.lowerBound, now: clock.now)
    return .ask(holder, request, timeoutMilliseconds: timeoutMilliseconds)
  }

  /// The last shards are shared out among the holders.
  private mutating func askForShards(_ index: Int) -> Action {
    let neighbor = neighbors[index]
    let share = max(1, shards.untakenCount / settings.activeHolderLimit)
    return ask(
      index,
      limit: min(
        neighbor.window(settings, shardBytes: shards.shardBytes) - neighbor.pace.readCount, share),
      timeoutMilliseconds: neighbor.isReading
        ? Settings.readingQuestionMilliseconds : Settings.questionMilliseconds)
  }

  // MARK: The last shards

  private var moveTime: UInt64 {
    shards.untakenCount == 0 && shards.isReading ? nextMove : .max
  }

  /// Takes a shard from the holder that is expected to need longest for what it owes, if another
  /// needs less than half of that: asks that one for it, and cancels the first read only then.
  private mutating func move() -> Action? {
    if moveTime > clock.now { return nil }
    nextMove = clock.now &+ Settings.movePauseNanoseconds
    guard activeCount < settings.activeHolderLimit + Settings.extraMoveHolders,
      let (shard, left) = latestShard(),
      let index = neighbors.indices.filter({ neighbors[$0].isIdle(clock.now) })
        .max(by: {
          neighbors.expectedSpeed(of: neighbors[$0]) < neighbors.expectedSpeed(of: neighbors[$1])
        })
    else { return nil }
    let needed = Double(shards.shardBytes) / neighbors.expectedSpeed(of: neighbors[index])
    if left < needed * 2 + Settings.leastMoveGainSeconds { return nil }
    return ask(index, limit: 1, wanted: shard..<(shard + 1))
  }

  /// A movable shard of the holder with the longest way to go, and the seconds it has left.
  private func latestShard() -> (shard: Int, seconds: Double)? {
    var latest: (shard: Int, seconds: Double)?
    for neighbor in neighbors where neighbor.isReading {
      let pace = neighbor.pace
      let silence = Double(clock.now &- min(clock.now, pace.lastCount)) * 1e-9
      let seconds = Double(pace.pendingBytes) / neighbors.expectedSpeed(of: neighbor)
      let left = max(seconds, silence > Settings.overdueFactor * seconds ? silence : 0)
      if left <= latest?.seconds ?? 0 { continue }
      let shard = shards.movableShard(of: neighbor.address, moveLimit: settings.moveLimit)
      if let shard { latest = (shard, left) }
    }
    return latest
  }

  // MARK: More holders

  /// Looks only if it has nothing to read and knows few holders: in a large swarm the holders
  /// themselves name others.
  private var discoveryTime: UInt64 {
    if shards.untakenCount == 0 { return .max }
    let living = holderCount
    if living == 0 && shards.isReading { return .max }
    let isStarving = activeCount <= 1 && living < settings.neighborLimit / 2
    if living > 0 && !isStarving { return .max }
    return discovery.time(limit: settings.discoveryLimit, isLimited: living > 0)
  }

  private mutating func discover() -> Action? {
    discovery.schedule(clock.now)
    if discoveryTime > clock.now { return nil }
    discovery.begin(clock.now)
    return .discover
  }

  // MARK: Giving up

  // What holders say keeps a download going for a bounded time only; bytes do for as long as they
  // come.

  /// Whether there is nobody left to hope for, and nothing on its way.
  package func isStuck(_ now: UInt64) -> Bool {
    !isComplete && clock.lastByte != nil && now > giveUpTime && !shards.isReading
      && !discovery.isUnderWay && !neighbors.contains { $0.isAwaited(now, settings) }
  }

  /// Whether no known holder may send what is missing: the living ones only have what is already
  /// here, as happens to receivers that all lost the same holder. They may get more, and the dead
  /// may come back, so a caller with nothing better to do waits until the plan is stuck.
  package func lacksSource(_ now: UInt64) -> Bool {
    guard let lastByte = clock.lastByte, !isComplete, !shards.isReading else { return false }
    return now >= lastByte &+ settings.sourcelessNanoseconds
      && !neighbors.contains { $0.mayHelp(now, settings, shardCount: shards.count) }
  }

  private var giveUpTime: UInt64 {
    clock.giveUpTime(
      settings, isIsolated: !neighbors.contains(where: \.isAlive),
      knowsOnlyCorrupt: failures.areBeyondHope && neighbors.allSatisfy(\.isBanned))
  }

  /// No question is sent and no read begun from then on.
  private var isOver: Bool { !isComplete && clock.now > giveUpTime }

  /// Ends what is still read.
  private mutating func giveUp() {
    for index in neighbors.indices
    where neighbors[index].isReading && !neighbors[index].isDropped {
      failures.record(neighbors[index].address, Self.silenceReason)
      neighbors[index].noteSilence()
      neighbors[index].drop()
      cancelReads(from: neighbors[index].address)
    }
  }
}
