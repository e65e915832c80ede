/// A receiver's side of the swarm: decides whom to ask for shards, and when a holder has failed.
///
/// Which shards it gets is the holders' choice. It keeps a bounded number of neighbors, reads from
/// a few of them at once, asks each again before its grants are used up, and gives what a dead or
/// corrupt one owes to others. No shard is ever read twice at the same time: both reads would write
/// the same memory.
package struct DownloadPlan: Sendable {
  package enum Action: Equatable, Sendable {
    /// Send it; report with `answered` or `askFailed`.
    case ask(HolderAddress, ShardRequest, timeoutMilliseconds: UInt64)
    /// Read it; report with `progressed`, then `finished` or `failed`.
    case read(HolderAddress, shard: Int)
    /// End this read early; report as ever how it ended.
    case cancel(HolderAddress, shard: Int)
    /// Tell a holder that was given up that nothing is read from it any more; report nothing.
    case leave(HolderAddress, ShardRequest)
    /// Look for more holders in the metadata service; `add` them, then report with `discovered`.
    case discover
  }

  package struct Settings: Sendable {
    package var neighborLimit = 16
    /// Holders that are asked or read at once.
    package var holdersAtOnce = 4
    /// What is granted ahead by a holder, at least two shards and at most `windowShards`.
    package var windowBytes: UInt64 = 16 << 20
    /// Of a holder that has not sent a good shard yet: all of them may be corrupt.
    package var unprovenShards = 4
    /// More where a holder is so fast that asking for that much at a time would slow it down.
    package var windowSeconds = 0.03
    package var windowShards = 64
    /// Others to turn to when a neighbor proves useless.
    package var candidateLimit = 32
    /// Looks into the metadata service while any neighbor lives.
    package var discoveryLimit = 4
    /// Without a byte and a living neighbor for so long it is stuck; longer than a network that is
    /// back needs.
    package var isolatedNanoseconds: UInt64 = 10_000_000_000
    /// The same where all that were known have sent wrong bytes or hold it no longer.
    package var corruptNanoseconds: UInt64 = 2_000_000_000
    /// Without a byte for so long, and without anybody who may send one, it is forsaken; a question
    /// is waited for as long.
    package var forsakenNanoseconds: UInt64 = 500_000_000
    /// With living neighbors from which no byte comes for so long it is stuck.
    package var starvedNanoseconds: UInt64 = 15_000_000_000
    /// The same where they say that others come first.
    package var queuedNanoseconds: UInt64 = 120_000_000_000
    /// Questions to a silent holder that it answers, without a byte, before it is given up: the
    /// pauses between them double.
    package var probeLimit = 4
    /// Without a whole shard for so long one holder more is asked or read at once.
    package var trialNanoseconds: UInt64 = 1_000_000_000
    /// A question takes up one of the places of `holdersAtOnce` for so long; and where nothing is
    /// read yet.
    package var lateNanoseconds: UInt64 = 200_000_000
    package var firstLateNanoseconds: UInt64 = 50_000_000
    /// Times a shard may be taken from a slow holder.
    package var moveLimit = 3

    package init() {}
  }

  struct Read: Sendable {
    let holder: HolderAddress
    var isCanceled = false
    /// Who has granted it too and gets it when this read has ended.
    var successor: HolderAddress?
  }

  let settings: Settings
  let shardCount: Int
  let shardBytes: UInt64
  let version: PayloadVersion
  let own: HolderAddress?
  let reader: UInt64
  var random: SwarmRandom
  /// Verified.
  package private(set) var verified: ShardSet
  /// Verified or being read.
  var taken: ShardSet
  var reads: [Int: Read] = [:]
  var moves: [Int: Int] = [:]
  var neighbors: [Neighbor] = []
  private var candidates: [HolderAddress] = []
  /// Holders not to be taken as neighbors, and until when.
  private var avoided: [UInt64: UInt64] = [:]
  private var origins: Set<UInt64> = []
  var queue: [Action] = []
  /// Of the latest ask.
  var turn: UInt64 = 0
  var isDiscovering = false
  var discoveries = 0
  var nextDiscovery: UInt64 = .max
  var nextMove: UInt64 = 0
  /// Latest time told.
  var clock: UInt64 = 0
  /// When bytes arrived last; nil: it has not begun.
  var lastByte: UInt64?
  /// When it began, and when a whole shard arrived last.
  var firstTime: UInt64?
  var lastWhole: UInt64 = 0
  /// When a holder answered last, and when one said last that others come first.
  var lastAnswer: UInt64 = 0
  var lastBusy: UInt64 = 0
  /// Those of `tried` that hold it no longer.
  var gone: Set<UInt64> = []
  /// Holders given up whose reads have not all ended.
  private var departing: [HolderAddress] = []
  /// Holders that failed and why, the latest of each.
  package private(set) var tried: [(holder: HolderAddress, reason: String)] = []
  package private(set) var corruptShardCount = 0
  /// Who sent a shard with other bytes than were published, and the first of these shards.
  package private(set) var corrupt: [(holder: HolderAddress, shard: Int)] = []

  /// `own` is told to others as a holder of what is verified; nil offers nothing. `have` is there
  /// already.
  package init(
    shardCount: Int, shardBytes: UInt64, version: PayloadVersion, own: HolderAddress?,
    reader: UInt64, seed: UInt64, have: ShardSet? = nil, settings: Settings = Settings()
  ) {
    self.settings = settings
    self.shardCount = shardCount
    self.shardBytes = max(1, shardBytes)
    self.version = version
    self.own = own
    self.reader = reader
    random = SwarmRandom(seed: seed)
    verified = have ?? ShardSet(count: shardCount)
    taken = verified
  }

  package var isComplete: Bool { verified.isFull }
  package var missingCount: Int { shardCount - verified.memberCount }
  package var holderCount: Int { neighbors.count { $0.isAlive } }
  package func isOrigin(_ holder: HolderAddress) -> Bool { origins.contains(holder.holding) }

  /// Those who count grants, or may, and are to be told at the end that nothing is read any more.
  package var lenders: [HolderAddress] {
    let leaving = queue.compactMap { action in
      if case .leave(let holder, _) = action { holder } else { nil }
    }
    return neighbors.filter { $0.isOwedWord || $0.isActive }.map(\.address) + departing + leaving
  }

  /// Who may be asked or read, or is to be told something.
  package var known: [HolderAddress] { neighbors.map(\.address) + lenders }

  /// Living holders without anything that is missing.
  package var useless: [HolderAddress] {
    neighbors.filter {
      $0.isAlive && !$0.isMute && $0.heldCount != nil && !$0.isActive
    }.map(\.address)
  }

  // MARK: Holders

  /// Takes a holder as a neighbor or, if there are enough, as one to turn to later.
  package mutating func add(_ holder: HolderAddress, isOrigin: Bool) {
    if holder.holding == own?.holding { return }
    if isOrigin { origins.insert(holder.holding) }
    if let known = index(of: holder) {
      if isOrigin { neighbors[known].isOrigin = true }
      return
    }
    if let until = avoided[holder.holding], until > clock { return }
    // Reads of its former time here must have ended.
    if reads.values.contains(where: { $0.holder.holding == holder.holding }) { return }
    let isNeeded = neighbors.count < settings.neighborLimit + (isOrigin ? Self.originLimit : 0)
    if isNeeded {
      neighbors.append(Neighbor(holder, isOrigin: isOrigin))
      candidates.removeAll { $0.holding == holder.holding }
    } else if !candidates.contains(where: { $0.holding == holder.holding }) {
      if candidates.count < settings.candidateLimit {
        candidates.append(holder)
      } else {
        candidates[Int.random(in: candidates.indices, using: &random)] = holder
      }
    }
  }

  /// Origins beside all other neighbors: honest records name one.
  private static let originLimit = 4

  /// What is known before the first question: whether the holder has answered another one. Those
  /// that have not are asked after the others.
  package mutating func expect(_ holder: HolderAddress, answers: Bool, now: UInt64) {
    guard let index = index(of: holder) else { return }
    if answers {
      neighbors[index].isKnown = true
    } else {
      neighbors[index].nextAsk = now &+ settings.lateNanoseconds
    }
  }

  /// What `discover` found has been added.
  package mutating func discovered(now: UInt64) {
    clock = now
    isDiscovering = false
  }

  // MARK: Asks

  package mutating func answered(by holder: HolderAddress, _ answer: ShardAnswer, now: UInt64) {
    clock = now
    for peer in answer.peers { add(peer, isOrigin: false) }
    guard let index = index(of: holder) else {
      // Given up while it was answering: nobody reads what it grants.
      if !answer.granted.isEmpty && avoided[holder.holding] != nil { depart(holder) }
      return
    }
    guard let asked = neighbors[index].asked else { return }
    neighbors[index].asked = nil
    if answer.state == .gone {
      gone.insert(holder.holding)
      drop(index, "holds it no longer")
      return
    }
    lastAnswer = now
    if answer.state == .busy { lastBusy = now }
    neighbors[index].putsOff = answer.state == .busy
    neighbors[index].heldCount = answer.heldCount
    neighbors[index].readerCount = answer.readerCount
    if neighbors[index].isDropped {
      neighbors[index].isOwedWord = true
      return
    }
    neighbors[index].failures = 0
    gone.remove(holder.holding)
    if !neighbors[index].isMute { tried.removeAll { $0.holder == holder } }
    let lease = min(answer.leaseMilliseconds, 86_400_000) * 1_000_000
    neighbors[index].renewal = now &+ max(lease / 2, 250_000_000)
    var isUseful = false
    // What nobody asked for is no reason to answer: that would bring one more like this.
    for shard in answer.granted.prefix(asked.limit) {
      if accept(shard, from: index, moving: asked.moving) {
        isUseful = true
      } else {
        neighbors[index].isOwedWord = true
      }
    }
    if isUseful {
      neighbors[index].refusals = 0
    } else if asked.limit > 0 {
      refused(index, retryMilliseconds: answer.retryMilliseconds)
    }
  }

  /// `isGone`: the holder itself lives but has this payload no longer. A question may be lost:
  /// while bytes come, they say more about the holder than it does.
  package mutating func askFailed(
    _ holder: HolderAddress, reason: String, isGone: Bool, now: UInt64
  ) {
    clock = now
    guard let index = index(of: holder) else { return }
    let asked = neighbors[index].asked
    neighbors[index].asked = nil
    let sends =
      neighbors[index].readCount > 0 && neighbors[index].lastProgress > asked?.since ?? .max
    if isGone { gone.insert(holder.holding) }
    if isGone || !sends { return drop(index, reason) }
    wait(index, milliseconds: 100)
    neighbors[index].renewal = neighbors[index].nextAsk
  }

  private mutating func accept(_ shard: Int, from index: Int, moving: Int?) -> Bool {
    guard shard >= 0, shard < shardCount else { return false }
    let holder = neighbors[index].address
    if !taken.contains(shard) {
      begin(shard, from: index)
      return true
    }
    guard moving == shard, let read = reads[shard], !read.isCanceled, read.holder != holder
    else { return false }
    reads[shard]?.isCanceled = true
    reads[shard]?.successor = holder
    moves[shard, default: 0] += 1
    queue.append(.cancel(read.holder, shard: shard))
    return true
  }

  private mutating func begin(_ shard: Int, from index: Int) {
    taken.insert(shard)
    reads[shard] = Read(holder: neighbors[index].address)
    neighbors[index].beginRead(shardBytes, now: clock)
    queue.append(.read(neighbors[index].address, shard: shard))
  }

  /// Comes again later; one that refuses time and again makes room for another.
  private mutating func refused(_ index: Int, retryMilliseconds: UInt64) {
    neighbors[index].refusals += 1
    let refusals = neighbors[index].refusals
    let patience = UInt64(50) << UInt64(min(refusals - 1, 3))
    wait(index, milliseconds: max(patience, min(retryMilliseconds, 5000)))
    if refusals < 3 || neighbors[index].isOrigin || neighbors[index].isActive { return }
    guard !neighbors[index].isOwedWord,
      let other = candidates.indices.randomElement(using: &random)
    else { return }
    let former = neighbors[index]
    neighbors[index] = Neighbor(candidates[other], isOrigin: false)
    // Asking at the same pace, whoever it is.
    neighbors[index].nextAsk = former.nextAsk
    neighbors[index].refusals = 2
    candidates[other] = former.address
  }

  private mutating func wait(_ index: Int, milliseconds: UInt64) {
    let jitter = 0.75 + 0.5 * random.unit()
    neighbors[index].nextAsk = clock &+ UInt64(Double(milliseconds) * 1e6 * jitter)
  }

  // MARK: Reads

  /// Bytes of shards have arrived; those of a finished shard need not be told. None: part of what
  /// cannot be counted yet.
  package mutating func progressed(_ holder: HolderAddress, bytes: UInt64, now: UInt64) {
    clock = now
    guard let index = index(of: holder), neighbors[index].readCount > 0 else { return }
    neighbors[index].progress(bytes, now: now)
    hear(from: index)
  }

  /// Bytes have come from a neighbor.
  private mutating func hear(from index: Int) {
    lastByte = clock
    if !neighbors[index].isMute { return }
    neighbors[index].isMute = false
    let holder = neighbors[index].address
    tried.removeAll { $0.holder == holder }
  }

  /// A shard has arrived. Returns whether it is intact and was missing.
  @discardableResult
  package mutating func finished(
    _ shard: Int, from holder: HolderAddress, isIntact: Bool, now: UInt64
  ) -> Bool {
    clock = now
    guard let read = endRead(shard, holder, isWhole: true) else { return false }
    if isIntact {
      // It was faster than the one that was to take over.
      if let successor = read.successor, let index = index(of: successor) {
        neighbors[index].isOwedWord = true
      }
      verified.insert(shard)
      (lastByte, lastWhole) = (now, now)
      if let index = index(of: holder) {
        neighbors[index].isProven = true
        hear(from: index)
      }
      return true
    }
    corruptShardCount += 1
    if corrupt.count < 32 && !corrupt.contains(where: { $0.holder == holder }) {
      corrupt.append((holder, shard))
    }
    release(shard, read)
    if let index = index(of: holder) {
      drop(index, "sent shard \(shard) with a wrong digest", isForever: true)
    }
    return false
  }

  /// A read has ended without its bytes, also when the plan canceled it.
  package mutating func failed(
    _ shard: Int, from holder: HolderAddress, reason: String, isDead: Bool, now: UInt64
  ) {
    clock = now
    guard let read = endRead(shard, holder, isWhole: false) else { return }
    release(shard, read)
    if read.isCanceled { return }
    guard let index = index(of: holder) else { return }
    neighbors[index].failures += 1
    if isDead || neighbors[index].failures >= 3 {
      drop(index, reason)
    } else {
      wait(index, milliseconds: 100)
    }
  }

  private mutating func endRead(_ shard: Int, _ holder: HolderAddress, isWhole: Bool) -> Read? {
    guard let read = reads[shard], read.holder == holder else { return nil }
    reads[shard] = nil
    if let index = index(of: holder), neighbors[index].readCount > 0 {
      neighbors[index].endRead(shardBytes, isWhole: isWhole, now: clock)
      neighbors[index].isOwedWord = true
    }
    if let place = departing.firstIndex(where: { $0.holding == holder.holding }) {
      departing.remove(at: place)
      depart(holder)
    }
    return read
  }

  /// The shard is missing again, or read from the one that stands ready.
  private mutating func release(_ shard: Int, _ read: Read) {
    if let successor = read.successor, let index = index(of: successor) {
      begin(shard, from: index)
    } else {
      taken.remove(shard)
    }
  }

  // MARK: Failure

  /// Ends what is read from a holder and does without it: for a while, or forever. An origin stays,
  /// to be tried again. Everybody else is told, so that its places are free for others.
  mutating func drop(_ index: Int, _ reason: String, isForever: Bool = false) {
    let holder = neighbors[index].address
    note(holder, reason)
    cancelReads(of: holder)
    for (shard, read) in reads where read.successor == holder { reads[shard]?.successor = nil }
    neighbors[index].failures += 1
    if neighbors[index].isOrigin {
      neighbors[index].isBanned = neighbors[index].isBanned || isForever
      neighbors[index].isDropped = neighbors[index].readCount > 0
      if neighbors[index].isBanned { depart(holder) }
      wait(index, milliseconds: min(1000, 100 << UInt64(min(neighbors[index].failures, 5))))
      return
    }
    let mayLend = neighbors[index].isAsking || neighbors[index].heldCount != nil
    neighbors.remove(at: index)
    if mayLend { depart(holder) }
    if avoided.count >= 256 { avoided = avoided.filter { $0.value == .max } }
    if avoided.count < 4096 { avoided[holder.holding] = isForever ? .max : clock &+ 2_000_000_000 }
    if let other = candidates.popLast() { add(other, isOrigin: false) }
  }

  mutating func cancelReads(of holder: HolderAddress) {
    for (shard, read) in reads where read.holder == holder && !read.isCanceled {
      reads[shard]?.isCanceled = true
      queue.append(.cancel(holder, shard: shard))
    }
  }

  /// Takes leave of a holder once all reads from it have ended.
  private mutating func depart(_ holder: HolderAddress) {
    if reads.values.contains(where: { $0.holder == holder }) {
      if !departing.contains(holder) { departing.append(holder) }
      return
    }
    turn += 1
    queue.append(
      .leave(
        holder,
        ShardRequest(
          holding: holder.holding, version: version, reader: reader, own: nil,
          have: ShardSet(count: shardCount), turn: turn, reading: [], limit: 0)))
  }

  mutating func note(_ holder: HolderAddress, _ reason: String) {
    tried.removeAll { $0.holder == holder }
    if tried.count == 32 { gone.remove(tried.removeFirst().holder.holding) }
    tried.append((holder, reason))
  }

  func index(of holder: HolderAddress) -> Int? {
    neighbors.firstIndex { $0.address.holding == holder.holding }
  }
}
