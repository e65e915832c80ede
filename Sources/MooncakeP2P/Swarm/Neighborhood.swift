/// The holders that a receiver may ask, those that it may turn to later, and those that it avoids.
struct Neighborhood: Sendable {
  private var neighbors: [Neighbor] = []
  private var candidates: [HolderAddress] = []
  /// Holdings that may not become neighbors, and until when.
  private var avoided: [UInt64: UInt64] = [:]
  private var origins: Set<UInt64> = []

  /// Origins beside all other neighbors: honest records name one.
  private static let extraOriginLimit = 4
  private static let avoidedNanoseconds: UInt64 = 2_000_000_000
  /// From this count on, only those that are avoided forever are kept.
  private static let avoidedCleaningCount = 256
  private static let avoidedLimit = 4096
  /// Bytes a second that are assumed before anything was measured.
  private static let assumedSpeed = 1e9
  /// A holder so many times slower than the fastest gets no more shards.
  private static let slowFactor = 8.0

  // MARK: Members

  var livingCount: Int { neighbors.count { $0.isAlive } }

  func isOrigin(_ holder: HolderAddress) -> Bool { origins.contains(holder.holding) }

  func index(of holder: HolderAddress) -> Int? {
    neighbors.firstIndex { $0.address.holding == holder.holding }
  }

  func isAvoided(_ holder: HolderAddress) -> Bool { avoided[holder.holding] != nil }

  mutating func markOrigin(_ holder: HolderAddress) {
    origins.insert(holder.holding)
    if let known = index(of: holder) { neighbors[known].isOrigin = true }
  }

  func mayAdd(_ holder: HolderAddress, now: UInt64) -> Bool {
    if index(of: holder) != nil { return false }
    return avoided[holder.holding].map { $0 <= now } ?? true
  }

  /// Adds a holder as a neighbor or, if there are enough, as a candidate.
  mutating func add(
    _ holder: HolderAddress, isOrigin: Bool, _ settings: DownloadPlan.Settings,
    _ random: inout SwarmRandom
  ) {
    assert(index(of: holder) == nil, "a neighbor is added twice")
    let limit = settings.neighborLimit + (isOrigin ? Self.extraOriginLimit : 0)
    if neighbors.count < limit {
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

  mutating func remove(at index: Int) { neighbors.remove(at: index) }

  /// Keeps a holder from becoming a neighbor again, for a while or forever.
  mutating func avoid(_ holder: HolderAddress, isForever: Bool, now: UInt64) {
    if avoided.count >= Self.avoidedCleaningCount { avoided = avoided.filter { $0.value == .max } }
    if avoided.count < Self.avoidedLimit {
      avoided[holder.holding] = isForever ? .max : now &+ Self.avoidedNanoseconds
    }
  }

  mutating func takeCandidate() -> HolderAddress? { candidates.popLast() }

  /// Replaces a neighbor that has nothing for us by a random candidate, and the other way around.
  /// The candidate is asked at the same pace, whoever it is.
  mutating func exchange(_ index: Int, refusals: Int, _ random: inout SwarmRandom) {
    guard let other = candidates.indices.randomElement(using: &random) else { return }
    let former = neighbors[index]
    neighbors[index] = Neighbor(candidates[other], inPlaceOf: former, refusals: refusals)
    candidates[other] = former.address
  }

  // MARK: Speeds

  /// What a holder sends, or is assumed to send if nothing was measured.
  func expectedSpeed(of neighbor: Neighbor) -> Double {
    Swift.max(1, neighbor.pace.speed ?? typicalSpeed)
  }

  var typicalSpeed: Double {
    let speeds = neighbors.compactMap(\.pace.speed)
    return speeds.isEmpty ? Self.assumedSpeed : speeds.reduce(0, +) / Double(speeds.count)
  }

  /// Speed that a new reader may expect of a neighbor, and some chance. The origin is left to
  /// receivers that find nobody else.
  func score(of neighbor: Neighbor, _ random: inout SwarmRandom) -> Double {
    typealias Settings = DownloadPlan.Settings
    let speed =
      neighbor.heldCount == 0 ? Settings.emptyHolderSpeed : neighbor.pace.speed ?? typicalSpeed
    let share = speed / Double(1 + neighbor.readerCount)
    let trust = neighbor.hasAnsweredBefore ? Settings.answeringPreference : 1
    let chance =
      Settings.preferenceFactor.least + Settings.preferenceFactor.spread * random.unit()
    return share * (neighbor.isOrigin ? Settings.originPreference : 1) * trust * chance
  }

  /// Far behind the fastest: it may finish what it has granted, but gets no more.
  func isSlow(_ neighbor: Neighbor) -> Bool {
    guard let speed = neighbor.pace.speed else { return false }
    return neighbors.contains { $0.isReading && $0.pace.speed ?? 0 > speed * Self.slowFactor }
  }

  /// How many are being read at a useful speed, or have a question that is not late. A holder that
  /// does not answer, or is far behind the fastest, keeps nobody else from being asked.
  func activeCount(_ isInTime: (Neighbor) -> Bool) -> Int {
    let fastest = neighbors.reduce(0) { Swift.max($0, $1.pace.speed ?? 0) }
    return neighbors.count { neighbor in
      neighbor.isReading && (neighbor.pace.speed ?? fastest) >= fastest / Self.slowFactor
        || isInTime(neighbor)
    }
  }
}

extension Neighborhood: RandomAccessCollection, MutableCollection {
  var startIndex: Int { neighbors.startIndex }
  var endIndex: Int { neighbors.endIndex }

  subscript(index: Int) -> Neighbor {
    get { neighbors[index] }
    _modify { yield &neighbors[index] }
  }
}
