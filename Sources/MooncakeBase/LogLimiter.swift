/// Limits the log, so that no peer can fill a disk by making this process log. Each call site is a
/// kind of line with its own supply; within a kind, each peer has a smaller supply. Lines left out
/// are counted and reported.
package struct LogLimiter: Sendable {
  /// A call site.
  package struct Kind: Hashable, Sendable {
    let file: UInt
    let line: UInt

    package init(_ file: StaticString, _ line: UInt) {
      self.file = UInt(bitPattern: file.utf8Start)
      self.line = line
    }
  }

  /// A burst of lines, then one per interval.
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
      // While full, the interval starts with the next line.
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
    /// The last logged line of this kind, as an example in the report.
    var example = ""
  }

  package static let kindCapacity = 10
  package static let kindInterval: UInt64 = 5_000_000_000
  package static let peerCapacity = 3
  package static let peerInterval: UInt64 = 10_000_000_000
  /// Peers tracked per kind; further ones share one supply.
  package static let peerLimit = 64
  /// After this long, left-out lines are reported in a line of their own.
  package static let reportInterval: UInt64 = 10_000_000_000
  private static let exampleBytes = 120

  private var entries: [Kind: Entry] = [:]

  package init() {}

  /// Whether a line of this kind about this peer may be logged now; counts it if not.
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

  /// A note about left-out lines of the same kind, to append to this one; nil if there are none.
  package mutating func note(_ kind: Kind, _ line: String) -> String? {
    guard entries[kind] != nil else { return nil }
    entries[kind]?.example = PrintableText.make(line, limit: Self.exampleBytes)
    let count = entries[kind]?.leftOutCount ?? 0
    entries[kind]?.leftOutCount = 0
    return count == 0 ? nil : "(\(count) similar lines left out)"
  }

  /// Reports on lines left out longer than the interval ago, or on all if `isEnd`.
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
  /// Forgets peers whose supply is full again, to make room for new ones.
  fileprivate mutating func forgetQuietPeers(_ now: UInt64) {
    peers = peers.filter { peer, supply in
      var supply = supply
      supply.refill(LogLimiter.peerCapacity, LogLimiter.peerInterval, now)
      return !supply.isFull(LogLimiter.peerCapacity)
    }
  }
}
