/// The shards that one node reads from another, one after the other.
final class Channel {
  let holder: Int
  let receiver: Int
  var shards: [Int] = []
  /// Of the first shard.
  var remainingBytes = 0.0
  var rate = 0.0
  var settled: UInt64 = 0
  /// Arrived, but not yet reported to the plan.
  var untoldBytes = 0.0
  /// Distinguishes current events from those scheduled for a former rate.
  var generation = 0
  var isFlowing = false

  init(holder: Int, receiver: Int) {
    self.holder = holder
    self.receiver = receiver
  }
}

/// Links: each node's capacity up and down, split evenly among its flowing channels. A flow gets
/// the smaller of its two shares. What it leaves of the other share stays unused, so results err on
/// the slow side, or goes to the other flows there if that is asked for.
struct Network {
  private(set) var up: [[Channel]]
  private(set) var down: [[Channel]]
  private let capacity: [Double]
  private let redistributes: Bool

  init(capacity: [Double], redistributes: Bool) {
    self.capacity = capacity
    self.redistributes = redistributes
    up = Array(repeating: [], count: capacity.count)
    down = up
  }

  /// Counts what has flowed since the last time.
  func settle(_ channel: Channel, now: UInt64) {
    let bytes = min(channel.remainingBytes, channel.rate * Double(now - channel.settled) * 1e-9)
    channel.remainingBytes -= bytes
    channel.untoldBytes += bytes
    channel.settled = now
  }

  mutating func start(_ channel: Channel, now: UInt64, changed: (Channel) -> Void) {
    channel.isFlowing = true
    channel.settled = now
    up[channel.holder].append(channel)
    down[channel.receiver].append(channel)
    share(channel, now, changed)
  }

  mutating func stop(_ channel: Channel, now: UInt64, changed: (Channel) -> Void) {
    if !channel.isFlowing { return }
    settle(channel, now: now)
    channel.isFlowing = false
    channel.rate = 0
    channel.generation += 1
    up[channel.holder].removeAll { $0 === channel }
    down[channel.receiver].removeAll { $0 === channel }
    share(channel, now, changed)
  }

  /// Calls `changed` with each channel whose shard will now end at another time.
  private func share(_ channel: Channel, _ now: UInt64, _ changed: (Channel) -> Void) {
    for other in up[channel.holder] { adjust(other, now, changed) }
    for other in down[channel.receiver] where other.holder != channel.holder {
      adjust(other, now, changed)
    }
  }

  private func adjust(_ channel: Channel, _ now: UInt64, _ changed: (Channel) -> Void) {
    let rate = min(
      level(at: channel.holder, up[channel.holder]) { down($0) },
      level(at: channel.receiver, down[channel.receiver]) { up($0) })
    if rate == channel.rate { return }
    settle(channel, now: now)
    channel.rate = rate
    changed(channel)
  }

  private func up(_ channel: Channel) -> Double {
    capacity[channel.holder] / Double(up[channel.holder].count)
  }

  private func down(_ channel: Channel) -> Double {
    capacity[channel.receiver] / Double(down[channel.receiver].count)
  }

  /// The most that a flow gets at one of its ends.
  private func level(at node: Int, _ channels: [Channel], _ limit: (Channel) -> Double) -> Double {
    var level = capacity[node] / Double(channels.count)
    if !redistributes { return level }
    // Shares that flows cannot use, because of their other end, go to the others.
    for _ in 0..<3 {
      let small = channels.map(limit).filter { $0 < level }
      if small.isEmpty || small.count == channels.count { break }
      level = (capacity[node] - small.reduce(0, +)) / Double(channels.count - small.count)
    }
    return level
  }
}
