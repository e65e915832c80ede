/// A holder's side of the swarm: decides who may read which shards now.
///
/// The shard granted least often goes first, at random among equals, so an origin sends each shard
/// once before it sends any twice, and receivers that ask the same holder get different ones.
///
/// A place is a turn: whoever has had it for a while gets no more grants while others wait. What it
/// was granted it may read to the end, but one that needs far longer for a shard than others counts
/// for the small part of a place that it uses, so that slow receivers keep no fast ones away.
package struct UploadLedger: Sendable {
  package struct Settings: Sendable {
    /// Places: receivers that read at once; others are told to come again, and who else has it.
    package var readersAtOnce = 4
    /// Readers in all, however little of a place each needs.
    package var readerLimit = 64
    /// How long a place is a receiver's while others wait.
    package var turnNanoseconds: UInt64 = 2_000_000_000
    /// Who reads less than a place's share of the link, divided by this, counts as a part of a
    /// reader.
    package var slowFactor = 4.0
    /// Waiting receivers that are remembered in the order in which they came.
    package var waiterLimit = 64
    /// Places of their own for those who read what they name: ranges, and the last shards of a
    /// download.
    package var extraReaders = 4
    package var grantsPerReader = 64
    package var leaseNanoseconds: UInt64 = 10_000_000_000
    package var rememberedPeers = 32
    package var toldPeers = 8
    /// Peers not heard from for so long are not told onward.
    package var peerNanoseconds: UInt64 = 30_000_000_000
    /// The refused are told to come so late that about this many ask in a second.
    package var refusalsPerSecond: UInt64 = 500
    package var shortestRetryMilliseconds: UInt64 = 20
    package var longestRetryMilliseconds: UInt64 = 2000
    package var pausedRetryMilliseconds: UInt64 = 100

    package init() {}
  }

  /// A receiver with grants; an ask renews the lease of all of them.
  struct Reader {
    var shards: [Int] = []
    var expiry: UInt64 = 0
    /// Of the latest ask.
    var turn: UInt64 = 0
    /// When it got its place, and the shards that it has read since.
    var since: UInt64
    var readCount: UInt64 = 0
    /// Whether it has said which shards it wants.
    var isNaming = false
    /// Nanoseconds a shard in its former turn.
    var formerPace: Double?
    /// Of `shards`, the first ones, that it has said it is reading.
    var begunCount = 0
    /// Shards that it has read after it had said so. Others it may only give back, since somebody
    /// else has granted them, too.
    var wholeCount: UInt64 = 0
  }

  private struct Peer {
    var address: HolderAddress
    var lastHeard: UInt64
  }

  let settings: Settings
  private var random: SwarmRandom
  private var grantCounts: [UInt32]
  var readers: [UInt64: Reader] = [:]
  private var peers: [Peer] = []
  /// How fast those were that have no grants any more.
  var paces = ReaderPaces()
  var queue: UploadQueue
  /// Of those who name shards.
  var namingQueue: UploadQueue
  /// Nanoseconds in which the link carried a shard when it was busiest lately, and when that was.
  var best: (nanoseconds: Double, time: UInt64)?
  /// When one reader more may show whether it is faster than those who hold all places.
  var nextTrial: UInt64 = 0
  private var isWithdrawn = false
  /// Whether nothing is granted and no lease renewed until this is false again.
  package var isPaused = false
  private var refusalSecond: UInt64 = 0
  private var refusals: UInt64 = 0
  private var refusalsBefore: UInt64 = 0
  /// Shards that the latest request gave back: their reader has read them.
  package private(set) var returned: [Int] = []

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
    // It has come late, and nobody waits for the answer any more.
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
      answer.retryMilliseconds = retryMilliseconds(request, now)
      let waits = answer.state == .busy && readers[request.reader] == nil
      if waits { wait(request, retryMilliseconds: answer.retryMilliseconds, now) }
    }
    answer.readerCount = readers.count
    // Who is being served knows enough others already.
    if isNew || answer.granted.isEmpty { answer.peers = somePeers(except: request.own, now: now) }
    if let own = request.own { remember(own, now: now) }
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

  /// Takes back what else was granted.
  private mutating func keep(_ request: ShardRequest, _ now: UInt64) {
    guard var entry = readers[request.reader] else { return }
    let begun = entry.shards.prefix(entry.begunCount)
    returned = entry.shards.filter { !request.reading.contains($0) }
    entry.shards.removeAll { !request.reading.contains($0) }
    // Of a part of a shard nothing is told.
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
    // Admitted, it waits no longer, whether there is anything for it or not.
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
    let limit = min(request.limit, settings.grantsPerReader - reader.shards.count)
    let granted = choose(limit: limit, request, available: available)
    if granted.isEmpty { return [] }
    for shard in granted { grantCounts[shard] &+= 1 }
    reader.shards += granted
    readers[request.reader] = reader
    return granted
  }

  /// One pass over the candidates that keeps the best few, best first.
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

  /// The more are refused, the later each shall come again, so that asking costs a holder the same
  /// however many want it.
  private mutating func retryMilliseconds(_ request: ShardRequest, _ now: UInt64) -> UInt64 {
    let second = now / 1_000_000_000
    if second != refusalSecond {
      refusalsBefore = second == refusalSecond &+ 1 ? refusals : 0
      refusals = 0
      refusalSecond = second
    }
    if request.limit > 0 { refusals += 1 }
    let waiting = max(refusals, refusalsBefore)
    return min(
      settings.longestRetryMilliseconds,
      max(settings.shortestRetryMilliseconds, waiting * 1000 / settings.refusalsPerSecond))
  }

  /// A newcomer takes the place of a random one, so memory stays bounded and dead ones fade.
  private mutating func remember(_ address: HolderAddress, now: UInt64) {
    let peer = Peer(address: address, lastHeard: now)
    if let known = peers.firstIndex(where: { $0.address.holding == address.holding }) {
      peers[known] = peer
    } else if peers.count < settings.rememberedPeers {
      peers.append(peer)
    } else {
      peers[Int.random(in: peers.indices, using: &random)] = peer
    }
  }

  private mutating func somePeers(except own: HolderAddress?, now: UInt64) -> [HolderAddress] {
    var told: [HolderAddress] = []
    let start = peers.isEmpty ? 0 : Int.random(in: peers.indices, using: &random)
    for step in peers.indices where told.count < settings.toldPeers {
      let peer = peers[(start + step) % peers.count]
      if peer.address.holding == own?.holding { continue }
      if now &- peer.lastHeard > settings.peerNanoseconds { continue }
      told.append(peer.address)
    }
    return told
  }
}
