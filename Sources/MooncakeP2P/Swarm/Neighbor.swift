/// A holder as a receiver knows it.
struct Neighbor: Sendable {
  /// A question that has not been answered.
  struct Question: Sendable {
    var limit: Int
    /// The shard that is to be moved to this holder.
    var moving: Int?
    var since: UInt64
  }

  let address: HolderAddress
  var isOrigin: Bool
  private(set) var pace = NeighborPace()
  /// nil if no question is under way.
  private(set) var question: Question?
  /// Shards that it has; nil if it never answered.
  private(set) var heldCount: Int?
  private(set) var readerCount = 0
  /// Whether it last said that it serves others first.
  private(set) var isBusy = false
  /// Whether it may count grants that this receiver does not use any more.
  private(set) var hasUnusedGrants = false
  /// When it must be asked again for its grants not to expire.
  private(set) var renewal: UInt64 = .max
  /// Not to be asked for shards before.
  private(set) var nextAsk: UInt64 = 0
  /// Answers in a row without a grant.
  private(set) var refusals = 0
  /// Failures in a row.
  private(set) var failures = 0
  /// Whether it answered a question before the first one about shards.
  private(set) var hasAnsweredBefore = false
  /// Whether it has sent a shard with the right digest.
  private(set) var isProven = false
  /// Has sent a shard with a wrong digest: never asked again.
  private(set) var isBanned = false
  /// Its reads have been canceled and not all have ended.
  private(set) var isDropped = false
  /// Dropped because it was silent, and no byte has come since.
  private(set) var isSilent = false

  private static let shortestRenewalNanoseconds: UInt64 = 250_000_000
  private static let leaseLimitMilliseconds: UInt64 = 86_400_000

  init(_ address: HolderAddress, isOrigin: Bool) {
    self.address = address
    self.isOrigin = isOrigin
  }

  /// One that was refused as often as the neighbor whose place it takes, and is asked no earlier.
  init(_ address: HolderAddress, inPlaceOf former: Neighbor, refusals: Int) {
    self.init(address, isOrigin: false)
    nextAsk = former.nextAsk
    self.refusals = refusals
  }

  var isAsking: Bool { question != nil }
  var isReading: Bool { pace.readCount > 0 }
  var isActive: Bool { isAsking || isReading }
  var isAlive: Bool { !isBanned && failures == 0 }

  // MARK: Questions

  mutating func expectAnswer() { hasAnsweredBefore = true }

  mutating func setNextAsk(_ time: UInt64) { nextAsk = time }

  /// It is asked again then, and not before.
  mutating func askAgain(at time: UInt64) { (nextAsk, renewal) = (time, time) }

  /// A question says which grants are used, and renews their lease.
  mutating func beginQuestion(limit: Int, moving: Int?, now: UInt64) {
    assert(question == nil, "one question to a holder at a time")
    hasUnusedGrants = false
    renewal = .max
    question = Question(limit: limit, moving: moving, since: now)
  }

  mutating func endQuestion() -> Question? {
    defer { question = nil }
    return question
  }

  mutating func noteAnswer(_ answer: ShardAnswer) {
    isBusy = answer.state == .busy
    heldCount = answer.heldCount
    readerCount = answer.readerCount
  }

  /// The answer is used: the neighbor works, and its grants live for as long as it says.
  mutating func accept(leaseMilliseconds: UInt64, now: UInt64) {
    failures = 0
    let lease = min(leaseMilliseconds, Self.leaseLimitMilliseconds) * 1_000_000
    renewal = now &+ max(lease / 2, Self.shortestRenewalNanoseconds)
  }

  mutating func noteUnusedGrants() { hasUnusedGrants = true }

  mutating func noteGrant() { refusals = 0 }

  mutating func noteRefusal() { refusals += 1 }

  mutating func noteProbe() { pace.noteProbe() }

  // MARK: Reads

  mutating func beginRead(_ bytes: UInt64, now: UInt64) { pace.beginRead(bytes, now: now) }

  mutating func progress(_ bytes: UInt64, now: UInt64) { pace.progress(bytes, now: now) }

  mutating func endRead(_ shardBytes: UInt64, isWhole: Bool, now: UInt64) {
    pace.endRead(shardBytes, isWhole: isWhole, now: now)
    if !isReading { isDropped = false }
    hasUnusedGrants = true
  }

  mutating func noteCorrectShard() { isProven = true }

  /// Bytes have come; returns whether it had been given up as silent.
  mutating func noteBytes() -> Bool {
    defer { isSilent = false }
    return isSilent
  }

  // MARK: Failure

  mutating func noteFailure() { failures += 1 }

  mutating func noteSilence() { isSilent = true }

  /// Nothing more is expected of what is being read.
  mutating func drop() { isDropped = isReading }

  mutating func ban() { isBanned = true }
}
