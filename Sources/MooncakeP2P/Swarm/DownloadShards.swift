/// The shards of a download and their state: missing, being read, read but not yet checked, or
/// verified. A shard is read from one holder at a time, because two reads would write to the same
/// memory.
struct DownloadShards: Sendable {
  /// A read that has begun and has not ended.
  struct Read: Sendable {
    let holder: HolderAddress
    fileprivate(set) var isCanceled = false
    /// Has granted the shard too, and is read next if this read fails.
    fileprivate(set) var successor: HolderAddress?
  }

  let count: Int
  let shardBytes: UInt64
  private(set) var verified: ShardSet
  /// Verified, being read, or being checked.
  private(set) var taken: ShardSet
  private var reads: [Int: Read] = [:]
  /// How often each shard was moved away from a slow holder.
  private var moveCounts: [Int: Int] = [:]

  /// `have` is already there.
  init(count: Int, shardBytes: UInt64, have: ShardSet?) {
    self.count = count
    self.shardBytes = max(1, shardBytes)
    verified = have ?? ShardSet(count: count)
    taken = verified
  }

  var isComplete: Bool { verified.isFull }
  var missingCount: Int { count - verified.memberCount }
  /// Shards that may be asked for.
  var untakenCount: Int { count - taken.memberCount }
  var isReading: Bool { !reads.isEmpty }

  func contains(_ shard: Int) -> Bool { (0..<count).contains(shard) }

  func isReading(from holder: HolderAddress) -> Bool {
    reads.values.contains { $0.holder == holder }
  }

  func readCount(from holder: HolderAddress) -> Int {
    reads.values.count { $0.holder == holder }
  }

  /// Whether anything is read from this holding, under whatever address.
  func isReading(holding: UInt64) -> Bool {
    reads.values.contains { $0.holder.holding == holding }
  }

  /// Shards that are read from a holder now, or will be if another holder fails.
  func claims(on holder: HolderAddress) -> [Int] {
    Array(reads.filter { $0.value.holder == holder || $0.value.successor == holder }.keys)
  }

  // MARK: Reads

  mutating func begin(_ shard: Int, from holder: HolderAddress) {
    assert(reads[shard] == nil, "shard \(shard) is being read already")
    assert(!verified.contains(shard), "shard \(shard) is there already")
    taken.insert(shard)
    reads[shard] = Read(holder: holder)
    checkInvariants()
  }

  /// Cancels the read of a shard that another holder has granted too. Returns the holder that it
  /// is read from; nil if it cannot be moved.
  mutating func move(_ shard: Int, to successor: HolderAddress) -> HolderAddress? {
    guard let read = reads[shard], !read.isCanceled, read.holder != successor else { return nil }
    assert(read.successor == nil, "shard \(shard) has a successor although it was not canceled")
    reads[shard]?.isCanceled = true
    reads[shard]?.successor = successor
    moveCounts[shard, default: 0] += 1
    return read.holder
  }

  /// Marks everything that is read from a holder as canceled; returns what was not yet.
  mutating func cancelReads(from holder: HolderAddress) -> [Int] {
    var canceled: [Int] = []
    for (shard, read) in reads where read.holder == holder && !read.isCanceled {
      reads[shard]?.isCanceled = true
      canceled.append(shard)
    }
    return canceled
  }

  /// Nothing will be read from this holder after another one fails.
  mutating func removeSuccessor(_ holder: HolderAddress) {
    for (shard, read) in reads where read.successor == holder { reads[shard]?.successor = nil }
  }

  /// The highest shard read from a holder that may still be moved to another.
  func movableShard(of holder: HolderAddress, moveLimit: Int) -> Int? {
    let movable = reads.filter {
      $0.value.holder == holder && !$0.value.isCanceled
        && moveCounts[$0.key, default: 0] < moveLimit
    }
    return movable.keys.max()
  }

  /// The read of a shard has ended: `verify`, `release` or `begin` must follow. Returns nil if no
  /// such read was under way.
  mutating func endRead(_ shard: Int, from holder: HolderAddress) -> Read? {
    guard let read = reads[shard], read.holder == holder else { return nil }
    reads[shard] = nil
    return read
  }

  /// A shard that was read has the right bytes.
  mutating func verify(_ shard: Int) {
    assertUnchecked(shard)
    verified.insert(shard)
    checkInvariants()
  }

  /// A shard that was read is missing again.
  mutating func release(_ shard: Int) {
    assertUnchecked(shard)
    taken.remove(shard)
    checkInvariants()
  }

  // MARK: Invariants

  private func assertUnchecked(_ shard: Int) {
    assert(taken.contains(shard), "shard \(shard) was not read")
    assert(reads[shard] == nil, "shard \(shard) is still being read")
    assert(!verified.contains(shard), "shard \(shard) was verified before")
  }

  private func checkInvariants() {
    assert(
      taken.memberCount == verified.memberCount + reads.count,
      "\(taken.memberCount) taken, \(verified.memberCount) verified, \(reads.count) being read")
  }
}
