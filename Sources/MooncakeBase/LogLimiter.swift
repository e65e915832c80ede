/// Decides which lines go to the log, so that nobody can fill a disk by what he makes this process
/// say. Each place in the code that logs is a kind of line, with a supply of lines of its own; each
/// peer has a smaller one of each kind. What stays out is counted, and told with the next line of
/// any kind.
package struct LogLimiter: Sendable {
  /// A place in the code.
  package struct Kind: Hashable, Sendable {
    let file: UInt
    let line: UInt

    package init(_ file: StaticString, _ line: UInt) {
      self.file = UInt(bitPattern: file.utf8Start)
      self.line = line
    }
  }

  /// Lines that may come at once, and then one in each interval.
  struct Supply: Sendable {
    private var left: Int
    private var since: UInt64

    init(_ capacity: Int, _ now: UInt64) {
      left = capacity
      since = now
    }

    mutating func refill(_ capacity: Int, _ interval: UInt64, _ now: UInt64) {
      if now <= since { return }
      let steps = (now - since) / interval
      left = Int(min(UInt64(capacity), UInt64(left) &+ min(steps, UInt64(capacity))))
      // While full it begins to count at the next line.
      since = left == capacity ? now : since &+ steps &* interval
    }

    var isEmpty: Bool { left == 0 }
    func isFull(_ capacity: Int) -> Bool { left == capacity }
    mutating func take() { left -= 1 }
  }

  fileprivate struct Entry: Sendable {
    var supply: Supply
    var peers: [String: Supply] = [:]
    var leftOutCount = 0
    var leftOutSince: UInt64 = 0
    /// What the last line of this kind said, for the report.
    var example = ""
  }

  package static let kindCapacity = 10
  package static let kindInterval: UInt64 = 5_000_000_000
  package static let peerCapacity = 3
  package static let peerInterval: UInt64 = 10_000_000_000
  /// Peers of a kind that are told apart; others share one supply.
  package static let peerLimit = 64
  /// After this long, what stayed out is told by itself.
  package static let reportInterval: UInt64 = 10_000_000_000
  private static let exampleBytes = 120

  private var entries: [Kind: Entry] = [:]

  package init() {}

  /// Whether a line of this kind about this peer may go out now; it is counted if not.
  package mutating func admits(_ kind: Kind, _ peer: String, now: UInt64) -> Bool {
    var entry = entries[kind] ?? Entry(supply: Supply(Self.kindCapacity, now))
    defer { entries[kind] = entry }
    entry.supply.refill(Self.kindCapacity, Self.kindInterval, now)
    var isAdmitted = !entry.supply.isEmpty
    if isAdmitted && !peer.isEmpty { isAdmitted = Self.admits(peer, &entry, now) }
    if isAdmitted {
      entry.supply.take()
    } else {
      if entry.leftOutCount == 0 { entry.leftOutSince = now }
      entry.leftOutCount += 1
    }
    return isAdmitted
  }

  private static func admits(_ peer: String, _ entry: inout Entry, _ now: UInt64) -> Bool {
    let isKnown = entry.peers[peer] != nil || entry.peers.count < peerLimit
    let key = isKnown ? peer : ""
    var supply = entry.peers[key] ?? Supply(peerCapacity, now)
    supply.refill(peerCapacity, peerInterval, now)
    let isAdmitted = !supply.isEmpty
    if isAdmitted { supply.take() }
    entry.peers[key] = supply
    if !isKnown { entry.forgetQuietPeers(now) }
    return isAdmitted
  }

  /// What the line is to say of others of its kind that stayed out; nil if none did.
  package mutating func note(_ kind: Kind, _ line: String) -> String? {
    guard entries[kind] != nil else { return nil }
    entries[kind]?.example = PrintableText.make(line, limit: Self.exampleBytes)
    let count = entries[kind]?.leftOutCount ?? 0
    entries[kind]?.leftOutCount = 0
    return count == 0 ? nil : "(\(count) similar lines left out)"
  }

  /// Lines about what stayed out for so long that it is told by itself, or in any case if `isEnd`.
  package mutating func reports(now: UInt64, isEnd: Bool = false) -> [String] {
    var lines: [String] = []
    for (kind, entry) in entries where entry.leftOutCount > 0 {
      // Another thread may have read the clock later and come first.
      let age = now > entry.leftOutSince ? now - entry.leftOutSince : 0
      if !isEnd && age < Self.reportInterval { continue }
      lines.append(
        "left out in \(age / 1_000_000) ms: \(entry.leftOutCount) lines like '\(entry.example)'")
      entries[kind]?.leftOutCount = 0
    }
    return lines
  }
}

extension LogLimiter.Entry {
  /// Makes room for peers that come now in place of those that have been quiet.
  fileprivate mutating func forgetQuietPeers(_ now: UInt64) {
    peers = peers.filter { peer, supply in
      var supply = supply
      supply.refill(LogLimiter.peerCapacity, LogLimiter.peerInterval, now)
      return !supply.isFull(LogLimiter.peerCapacity)
    }
  }
}
