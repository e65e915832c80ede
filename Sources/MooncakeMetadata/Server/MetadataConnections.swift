/// Decides which of a metadata server's connections have taken too long and which are closed to
/// make room for others. Pure bookkeeping without sockets or a clock.
package struct MetadataConnections {
  package typealias Key = UInt

  /// What a connection does.
  package enum Phase: Sendable {
    /// Waiting for the head of a request; the connection may be idle.
    case head
    case body
    /// The request has arrived and the server is working on the answer.
    case work
    /// As `work`, but the answer waits for changes.
    case watch
    /// The client has not yet taken the whole answer.
    case answer
  }

  // Holds no text, so that scanning all connections is cheap.
  package struct Connection: Sendable {
    package let socket: Int32
    fileprivate let group: Int
    package fileprivate(set) var phase = Phase.head
    /// When the phase began, on `Clock`, in nanoseconds.
    package fileprivate(set) var since: UInt64
    /// Bytes of an incoming value or of an answer.
    fileprivate var heldBytes = 0
    /// It has been given a useful answer once, so it belongs to a real client.
    fileprivate var isKnown = false
    package fileprivate(set) var isClosing = false

    /// Between two requests.
    package var isIdle: Bool { isKnown && phase == .head }
    fileprivate var isAtWork: Bool { phase == .work || phase == .watch }
    fileprivate var isCandidate: Bool { !isClosing && !isAtWork }
  }

  /// The connections of one address.
  private struct Group {
    var name: String
    /// Connections that are not closing.
    var openCount = 0
    var count = 0
  }

  package enum Verdict: Equatable, Sendable {
    case welcome
    /// Welcome after closing this one.
    case instead(of: Key)
    /// Its address has as many as allowed, and all of them are at work.
    case refused
    /// Every connection is at work.
    case full
  }

  private let limit: Int
  private let groupLimit: Int
  private let patience: UInt64
  private let grace: UInt64
  private var all: [Key: Connection] = [:]
  private var groups: [Group] = []
  private var indexes: [String: Int] = [:]
  /// Unused indexes of `groups`.
  private var free: [Int] = []
  /// Connections that are not closing.
  package private(set) var count = 0
  /// No connection is overdue before this time, in nanoseconds on `Clock`.
  package private(set) var nextCheck = UInt64.max

  /// Connections slower than the grace may be closed if others need the place; those slower than
  /// the patience are closed anyway.
  package init(
    limit: Int, groupLimit: Int, patienceMilliseconds: UInt64, graceMilliseconds: UInt64
  ) {
    self.limit = limit
    self.groupLimit = groupLimit
    patience = patienceMilliseconds &* 1_000_000
    grace = graceMilliseconds &* 1_000_000
  }

  package subscript(key: Key) -> Connection? { all[key] }

  package var isEmpty: Bool { all.isEmpty }

  /// The name of a connection's group.
  package func group(of key: Key) -> String { all[key].map { groups[$0.group].name } ?? "" }

  package mutating func add(_ key: Key, socket: Int32, group name: String, now: UInt64) {
    let group = indexes[name] ?? free.popLast() ?? groups.count
    if group == groups.count { groups.append(Group(name: name)) }
    indexes[name] = group
    groups[group].name = name
    groups[group].openCount += 1
    groups[group].count += 1
    all[key] = Connection(socket: socket, group: group, since: now)
    count += 1
    nextCheck = min(nextCheck, now &+ patience)
  }

  package mutating func remove(_ key: Key) {
    startClosing(key)
    guard let group = all.removeValue(forKey: key)?.group else { return }
    groups[group].count -= 1
    if groups[group].count == 0 {
      indexes[groups[group].name] = nil
      free.append(group)
    }
    if all.isEmpty { nextCheck = .max }
  }

  /// Marks a connection as closing and frees its place.
  package mutating func startClosing(_ key: Key) {
    guard let connection = all[key], !connection.isClosing else { return }
    all[key]?.isClosing = true
    groups[connection.group].openCount -= 1
    count -= 1
  }

  package mutating func enter(_ phase: Phase, _ key: Key, now: UInt64) {
    all[key]?.phase = phase
    all[key]?.since = now
    nextCheck = min(nextCheck, now &+ patience)
  }

  /// Called when the client has its answer; `isKnown` if the answer was one that only real clients
  /// get.
  package mutating func finish(_ key: Key, isKnown: Bool, now: UInt64) {
    if isKnown { all[key]?.isKnown = true }
    all[key]?.heldBytes = 0
    enter(.head, key, now: now)
  }

  /// Records how much memory a connection holds.
  package mutating func hold(_ byteCount: Int, _ key: Key) { all[key]?.heldBytes = byteCount }

  /// Gives all connections more time after the server itself did not run for a while.
  package mutating func postpone(nanoseconds: UInt64) {
    for key in all.keys { all[key]?.since &+= nanoseconds }
    if nextCheck != .max { nextCheck &+= nanoseconds }
  }

  // MARK: Choices

  /// Whether one more connection of a group is accepted.
  package func verdict(group name: String, now: UInt64) -> Verdict {
    if let group = indexes[name], groups[group].openCount >= groupLimit {
      return stalest(of: group, now: now).map { .instead(of: $0) } ?? .refused
    }
    if count < limit { return .welcome }
    return stalest(now: now).map { .instead(of: $0) } ?? .full
  }

  /// Whether no place is free and none can be freed.
  package var isFull: Bool {
    count >= limit && !all.values.contains { $0.isCandidate }
  }

  /// Which connection to close first. Of the group with the most connections: first one that was
  /// never answered and is older than the grace, then the one waited for longest, last one that is
  /// new or in the middle of a request. Never one at work.
  package func stalest(now: UInt64) -> Key? { stalest(of: nil, now: now) }

  private func stalest(of group: Int?, now: UInt64) -> Key? {
    first { connection in
      if !connection.isCandidate || (group != nil && connection.group != group) { return nil }
      let isYoung = now < connection.since &+ grace
      let tier = isYoung && !connection.isIdle ? 2 : connection.isKnown ? 1 : 0
      return (-groups[connection.group].openCount, tier, connection.since)
    }
  }

  /// Which wait for changes to end first, in the given group or else the one with the most
  /// connections; only waits older than the grace.
  package func longestWatch(group name: String?, now: UInt64) -> Key? {
    let group = name.map { indexes[$0] ?? -1 }
    return first { connection in
      guard connection.phase == .watch, !connection.isClosing, now >= connection.since &+ grace,
        group == nil || connection.group == group
      else { return nil }
      return (-groups[connection.group].openCount, 0, connection.since)
    }
  }

  /// Which connection in `phase` to close to free memory: of the group that holds most, the one
  /// waited for longest. nil if connections already closing will free enough.
  package func heaviest(in phase: Phase, neededBytes: Int, now: UInt64) -> Key? {
    var closingBytes = 0
    var bytes = [Int](repeating: 0, count: groups.count)
    for connection in all.values where connection.phase == phase {
      if connection.isClosing { closingBytes += connection.heldBytes }
      bytes[connection.group] += connection.heldBytes
    }
    if closingBytes >= neededBytes { return nil }
    return first { connection in
      guard connection.phase == phase, !connection.isClosing, connection.heldBytes > 0,
        now >= connection.since &+ grace
      else { return nil }
      return (-bytes[connection.group], 0, connection.since)
    }
  }

  /// The connection with the lowest rank; those ranked nil are not considered.
  private func first(_ rank: (Connection) -> (Int, Int, UInt64)?) -> Key? {
    var best: (key: Key, rank: (Int, Int, UInt64))?
    for (key, connection) in all {
      guard let rank = rank(connection) else { continue }
      if best.map({ rank < $0.rank }) ?? true { best = (key, rank) }
    }
    return best?.key
  }

  /// The connections that have taken too long.
  package mutating func overdue(now: UInt64) -> [Key] {
    if now < nextCheck { return [] }
    nextCheck = .max
    var keys: [Key] = []
    for (key, connection) in all where connection.isCandidate {
      let end = connection.since &+ patience
      if end <= now { keys.append(key) } else { nextCheck = min(nextCheck, end) }
    }
    return keys
  }
}
