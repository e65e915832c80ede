/// Who is connected to a metadata server and since when it waits for them: which connections have
/// taken too long, and which make room for others. Without sockets or a clock.
package struct MetadataConnections {
  package typealias Key = UInt

  /// What a connection does.
  package enum Phase: Sendable {
    /// The server waits for the head of a request; it may be idle.
    case head
    case body
    /// The request is there, its answer not yet: the server's business.
    case work
    /// The client has not taken the whole answer.
    case answer
  }

  package struct Connection: Sendable {
    package let socket: Int32
    /// Whom it counts for.
    package let group: String
    package fileprivate(set) var phase = Phase.head
    /// When the phase began, on `Clock`, in nanoseconds.
    package fileprivate(set) var since: UInt64
    /// It has been answered once: it belongs to somebody who asks.
    fileprivate var isKnown = false
    fileprivate var isClosing = false

    /// Between two requests.
    package var isIdle: Bool { isKnown && phase == .head }
  }

  package enum Verdict: Equatable, Sendable {
    case welcome
    /// Welcome when this one has been closed.
    case instead(of: Key)
    /// Its address has all that one may have, and all of them are at work.
    case refused
    /// Every connection is at work.
    case full
  }

  private let limit: Int
  private let groupLimit: Int
  private let patience: UInt64
  private var all: [Key: Connection] = [:]
  /// Connections that are not closing.
  private var counts: [String: Int] = [:]
  package private(set) var count = 0
  /// None has taken too long before, in nanoseconds on `Clock`.
  package private(set) var nextCheck = UInt64.max

  package init(limit: Int, groupLimit: Int, patienceMilliseconds: UInt64) {
    self.limit = limit
    self.groupLimit = groupLimit
    patience = patienceMilliseconds &* 1_000_000
  }

  package subscript(key: Key) -> Connection? { all[key] }

  package mutating func add(_ key: Key, socket: Int32, group: String, now: UInt64) {
    all[key] = Connection(socket: socket, group: group, since: now)
    counts[group, default: 0] += 1
    count += 1
    nextCheck = min(nextCheck, now &+ patience)
  }

  package mutating func remove(_ key: Key) {
    guard let connection = all.removeValue(forKey: key) else { return }
    if !connection.isClosing { uncount(connection.group) }
    if all.isEmpty { nextCheck = .max }
  }

  private mutating func uncount(_ group: String) {
    count -= 1
    let left = counts[group, default: 1] - 1
    counts[group] = left == 0 ? nil : left
  }

  /// It is as good as closed: its place is free.
  package mutating func startClosing(_ key: Key) {
    guard let connection = all[key], !connection.isClosing else { return }
    all[key]?.isClosing = true
    uncount(connection.group)
  }

  package mutating func enter(_ phase: Phase, _ key: Key, now: UInt64) {
    guard var connection = all[key] else { return }
    if connection.phase == .answer && phase == .head { connection.isKnown = true }
    connection.phase = phase
    connection.since = now
    all[key] = connection
    nextCheck = min(nextCheck, now &+ patience)
  }

  // MARK: Choices

  /// Whether one more may come from a group.
  package func verdict(group: String) -> Verdict {
    if counts[group, default: 0] >= groupLimit {
      return stalest { $0.group == group }.map { .instead(of: $0) } ?? .refused
    }
    if count < limit { return .welcome }
    return stalest { _ in true }.map { .instead(of: $0) } ?? .full
  }

  /// There is no place, and nobody to make one.
  package var isFull: Bool { count >= limit && stalest { _ in true } == nil }

  /// Whom to close first: of the group with the most connections, who has never got an answer, and
  /// whom the server has waited for longest. Never one at work.
  package func stalest(_ isMeant: (Connection) -> Bool) -> Key? {
    var best: (key: Key, rank: (Int, Int, UInt64))?
    for (key, connection) in all where !connection.isClosing && connection.phase != .work {
      if !isMeant(connection) { continue }
      let rank = (
        -counts[connection.group, default: 0], connection.isKnown ? 1 : 0, connection.since
      )
      if best.map({ rank < $0.rank }) ?? true { best = (key, rank) }
    }
    return best?.key
  }

  /// Those that have taken too long.
  package mutating func overdue(now: UInt64) -> [Key] {
    if now < nextCheck { return [] }
    nextCheck = .max
    var keys: [Key] = []
    for (key, connection) in all where !connection.isClosing && connection.phase != .work {
      let end = connection.since &+ patience
      if end <= now { keys.append(key) } else { nextCheck = min(nextCheck, end) }
    }
    return keys
  }
}
