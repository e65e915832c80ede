import CLinux
import MooncakeP2P

/// A swarm on a virtual clock: node 0 is the origin, the others receive. Links, latencies and
/// failures are modeled; the store's own code decides who asks whom and who grants what.
package final class Simulation {
  private enum Event {
    case start(Int)
    case wake(Int)
    /// Nobody waits for the answer to the last message that a holder gets.
    case askArrives(from: Int, to: Int, ShardRequest, deadline: UInt64, isLast: Bool)
    case answer(Int, from: Int, ShardAnswer)
    case askFails(Int, from: Int, isRefused: Bool)
    case flow(Channel)
    case shardArrives(Channel, generation: Int)
    case readFails(Int, from: Int, shard: Int, isDead: Bool)
    case discovered(Int)
    case fail(Int, Scenario.Fault)
  }

  private struct Node {
    var plan: DownloadPlan?
    var ledger: UploadLedger?
    var fault: Scenario.Fault?
    var isFinished = false
    /// When the processing of the next answer may begin.
    var freeTime: UInt64 = 0
    var wakeTime = UInt64.max
    var lastShard: UInt64?
    var startTime: UInt64 = 0

    /// Neither asks nor answers any more.
    var hasEnded: Bool { fault == .killed || fault == .silenced }
  }

  private let scenario: Scenario
  private var random: SwarmRandom
  private var now: UInt64 = 0
  private var queue = EventQueue<Event>()
  private var nodes: [Node]
  private var network: Network
  private var channels: [Int: Channel] = [:]
  private var registered: [Int] = []
  private var unfinishedCount: Int
  private var firstStart = UInt64.max
  private var originBytes = 0.0
  private var outcome = Outcome()
  private let everything: ShardSet
  private let version = PayloadVersion(high: 1, low: 2)

  package init(_ scenario: Scenario) {
    self.scenario = scenario
    random = SwarmRandom(seed: scenario.seed)
    let count = scenario.receiverCount + 1
    nodes = Array(repeating: Node(), count: count + scenario.deadRecordCount)
    for dead in count..<nodes.count {
      nodes[dead].fault = .silenced
      registered.append(dead)
    }
    network = Network(
      capacity: nodes.indices.map {
        scenario.linkBytesPerSecond * scenario.slowNodes[$0, default: 1]
      }, redistributes: scenario.redistributes)
    unfinishedCount = scenario.receiverCount
    everything = ShardSet(count: scenario.shardCount, isFull: true)
    var ledgerSettings = scenario.ledger
    if scenario.isOriginAlone { ledgerSettings.placeLimit = .max / 2 }
    nodes[0].ledger = UploadLedger(
      shardCount: scenario.shardCount, seed: random.next(), settings: ledgerSettings)
    for node in 1..<count {
      let lead = scenario.slowNodes[node] == nil ? scenario.slowLead : 0
      queue.add(.start(node), at: lead + random.next() % max(1, scenario.startSpread))
    }
    for (node, time, fault) in scenario.faults { queue.add(.fail(node, fault), at: time) }
  }

  /// Runs until every receiver has finished, failed or given up.
  package func run() -> Outcome {
    while unfinishedCount > 0, let (time, event) = queue.next(), time < scenario.limit {
      now = time
      handle(event)
    }
    outcome.originCopies = originBytes / Double(scenario.payloadBytes)
    measureMemory()
    return outcome
  }

  private func address(_ node: Int) -> HolderAddress {
    HolderAddress(holding: UInt64(node + 1), rpc: "node:1", segment: "node")
  }

  private func node(_ holder: HolderAddress) -> Int { Int(holder.holding) - 1 }

  private func handle(_ event: Event) {
    switch event {
    case .start(let node): start(node)
    case .wake(let node): if nodes[node].wakeTime == now { pump(node) }
    case .askArrives(let from, let to, let request, let deadline, let isLast):
      answer(from, to, request, deadline, isLast)
    case .answer(let node, let holder, let answer):
      nodes[node].plan?.answered(by: address(holder), answer, now: now)
      pump(node)
    case .askFails(let node, let holder, let isRefused):
      nodes[node].plan?.askFailed(
        address(holder), reason: isRefused ? "refused" : "timed out", isGone: false, now: now)
      pump(node)
    case .flow(let channel): flow(channel)
    case .shardArrives(let channel, let generation):
      if channel.generation == generation { shardArrives(channel) }
    case .readFails(let node, let holder, let shard, let isDead):
      nodes[node].plan?.failed(
        shard, from: address(holder), reason: "reset", isDead: isDead, now: now)
      pump(node)
    case .discovered(let node):
      addHolders(node)
      nodes[node].plan?.discovered(now: now)
      pump(node)
    case .fail(let node, let fault): fail(node, fault)
    }
  }

  // MARK: Receivers

  /// Head, page of holders, lease, own record: four operations; a fifth reports completion.
  private func start(_ node: Int) {
    firstStart = min(firstStart, now)
    if nodes[node].hasEnded { return }
    nodes[node].startTime = now
    let isAlone = scenario.isOriginAlone
    outcome.metadataOperations += isAlone ? 1 : 5
    nodes[node].plan = DownloadPlan(
      shardCount: scenario.shardCount, shardBytes: scenario.shardBytes, version: version,
      own: isAlone ? nil : address(node), reader: UInt64(node), seed: random.next(),
      settings: scenario.plan)
    nodes[node].plan?.add(address(0), isOrigin: true)
    if !isAlone {
      nodes[node].ledger = UploadLedger(
        shardCount: scenario.shardCount, seed: random.next(), settings: scenario.ledger)
      addHolders(node)
      registered.append(node)
    }
    pump(node)
  }

  /// A page of records from a random position; those of dead holders are still among them.
  private func addHolders(_ node: Int) {
    if registered.count <= 16 {
      for holder in registered { nodes[node].plan?.add(address(holder), isOrigin: false) }
      return
    }
    for _ in 0..<16 {
      let holder = registered[Int.random(in: registered.indices, using: &random)]
      nodes[node].plan?.add(address(holder), isOrigin: false)
    }
  }

  private func pump(_ node: Int) {
    guard nodes[node].plan != nil, !nodes[node].hasEnded, !nodes[node].isFinished else { return }
    tellProgress(node)
    while let action = nodes[node].plan!.next(now) { perform(action, node) }
    if nodes[node].plan!.isComplete { return finish(node) }
    if nodes[node].plan!.isStuck(now) {
      outcome.stuckCount += 1
      outcome.stuckNodes.insert(node)
      outcome.longestDespair = max(outcome.longestDespair, now - nodes[node].startTime)
      nodes[node].isFinished = true
      unfinishedCount -= 1
      return
    }
    // Being stuck is noticed at the latest by the check once a second.
    let time = min(max(now + 1, nodes[node].plan!.wakeTime), now + 1_000_000_000)
    if time == nodes[node].wakeTime { return }
    nodes[node].wakeTime = time
    queue.add(.wake(node), at: time)
  }

  private func tellProgress(_ node: Int) {
    for channel in network.down[node] {
      network.settle(channel, now: now)
      if channel.untoldBytes < 1 { continue }
      nodes[node].plan!.progressed(
        address(channel.holder), bytes: UInt64(channel.untoldBytes), now: now)
      channel.untoldBytes = 0
    }
  }

  private func finish(_ node: Int) {
    nodes[node].isFinished = true
    unfinishedCount -= 1
    outcome.completeCount += 1
    outcome.durations[node] = now - nodes[node].startTime
    outcome.makespan = max(outcome.makespan, now - firstStart)
    for holder in nodes[node].plan!.holdersWithGrants {
      let request = ShardRequest.farewell(
        to: holder, version: version, reader: UInt64(node), shardCount: scenario.shardCount)
      queue.add(
        .askArrives(
          from: node, to: self.node(holder), request, deadline: .max, isLast: true),
        at: now + scenario.latency)
    }
    if let fault = scenario.originFault, outcome.completeCount == 1 { fail(0, fault) }
  }

  private func perform(_ action: DownloadPlan.Action, _ node: Int) {
    switch action {
    case .ask(let holder, let request, let timeoutMilliseconds):
      outcome.askCount += 1
      queue.add(
        .askArrives(
          from: node, to: self.node(holder), request,
          deadline: now + timeoutMilliseconds * 1_000_000, isLast: false),
        at: now + scenario.latency)
    case .read(let holder, let shard): read(shard, node, self.node(holder))
    case .cancel(let holder, let shard): cancel(shard, node, self.node(holder))
    case .leave(let holder, let request):
      queue.add(
        .askArrives(
          from: node, to: self.node(holder), request, deadline: .max, isLast: true),
        at: now + scenario.latency)
    case .discover:
      outcome.metadataOperations += 1
      queue.add(.discovered(node), at: now + 2_000_000)
    }
  }

  // MARK: Asks

  private func answer(
    _ from: Int, _ to: Int, _ request: ShardRequest, _ deadline: UInt64, _ isLast: Bool
  ) {
    if nodes[to].hasEnded || isLost(request, from, to) {
      if isLast { return }
      let isRefused = nodes[to].fault == .killed
      queue.add(
        .askFails(from, from: to, isRefused: isRefused),
        at: isRefused ? now + scenario.latency : deadline)
      return
    }
    let available = to == 0 ? everything : nodes[to].plan!.verified
    let answer = nodes[to].ledger!.answer(request, available: available, now: now)
    if to == 0 { outcome.originAskCount += 1 }
    if answer.state == .busy { outcome.busyCount += 1 }
    outcome.unusedGrantCount += answer.granted.count
    nodes[to].freeTime = max(now, nodes[to].freeTime) + scenario.askCost
    let arrival = nodes[to].freeTime + scenario.latency
    if nodes[from].isFinished || isLast { return }
    if arrival > deadline || isLost(answer, from, to) {
      queue.add(.askFails(from, from: to, isRefused: false), at: deadline)
    } else {
      queue.add(.answer(from, from: to, answer), at: arrival)
    }
  }

  /// Lost by chance, or because it is too large.
  private func isLost(_ request: ShardRequest, _ from: Int, _ to: Int) -> Bool {
    if scenario.lostPerMille > 0, random.next() % 1000 < scenario.lostPerMille { return true }
    if !isNarrow(from, to) { return false }
    // Base64 of one bit per shard, plus framing.
    return request.have.count / 6 + request.reading.count * 4 + 400 > Self.narrowBytes
  }

  private func isLost(_ answer: ShardAnswer, _ from: Int, _ to: Int) -> Bool {
    if !isNarrow(from, to) { return false }
    return answer.peers.count * 100 + answer.granted.count * 5 + 200 > Self.narrowBytes
  }

  private func isNarrow(_ one: Int, _ other: Int) -> Bool {
    nodes[one].fault == .narrowed || nodes[other].fault == .narrowed
  }

  private static let narrowBytes = 1400

  // MARK: Reads

  private func channel(_ holder: Int, _ receiver: Int) -> Channel {
    let key = holder << 32 | receiver
    if let channel = channels[key] { return channel }
    let channel = Channel(holder: holder, receiver: receiver)
    channels[key] = channel
    return channel
  }

  private func read(_ shard: Int, _ node: Int, _ holder: Int) {
    outcome.readCount += 1
    outcome.unusedGrantCount -= 1
    if nodes[holder].fault == .killed {
      queue.add(
        .readFails(node, from: holder, shard: shard, isDead: true), at: now + scenario.latency)
      return
    }
    let channel = channel(holder, node)
    channel.shards.append(shard)
    if channel.shards.count > 1 { return }
    channel.remainingBytes = Double(scenario.shardBytes)
    queue.add(.flow(channel), at: now + 2 * scenario.latency)
  }

  private func flow(_ channel: Channel) {
    if channel.isFlowing || channel.shards.isEmpty || nodes[channel.holder].fault != nil { return }
    if nodes[channel.receiver].fault == .narrowed { return }
    network.start(channel, now: now, changed: schedule)
  }

  private func schedule(_ channel: Channel) {
    channel.generation += 1
    let time = now + UInt64((channel.remainingBytes / channel.rate * 1e9).rounded(.up))
    queue.add(.shardArrives(channel, generation: channel.generation), at: time)
  }

  private func shardArrives(_ channel: Channel) {
    network.settle(channel, now: now)
    let shard = channel.shards.removeFirst()
    channel.untoldBytes = 0
    if channel.holder == 0 { originBytes += Double(scenario.shardBytes) }
    if channel.shards.isEmpty {
      network.stop(channel, now: now, changed: schedule)
    } else {
      channel.remainingBytes = Double(scenario.shardBytes)
      schedule(channel)
    }
    let node = channel.receiver
    if nodes[node].plan == nil { return }
    let isIntact = !scenario.corruptNodes.contains(channel.holder)
    if !isIntact { outcome.corruptCount += 1 }
    let wasThere = nodes[node].plan!.verified.contains(shard)
    let isNew = nodes[node].plan!.finished(
      shard, from: address(channel.holder), isIntact: isIntact, now: now)
    if isNew && wasThere { outcome.doubleCount += 1 }
    if isNew {
      if let last = nodes[node].lastShard {
        outcome.longestGap = max(outcome.longestGap, now - last)
      }
      nodes[node].lastShard = now
    }
    pump(node)
  }

  private func cancel(_ shard: Int, _ node: Int, _ holder: Int) {
    let channel = channel(holder, node)
    guard let position = channel.shards.firstIndex(of: shard) else { return }
    outcome.canceledCount += 1
    channel.shards.remove(at: position)
    if position == 0 {
      if channel.isFlowing { network.settle(channel, now: now) }
      if holder == 0 { originBytes += Double(scenario.shardBytes) - channel.remainingBytes }
      channel.remainingBytes = Double(scenario.shardBytes)
      if channel.shards.isEmpty {
        network.stop(channel, now: now, changed: schedule)
      } else if channel.isFlowing {
        schedule(channel)
      }
    }
    queue.add(.readFails(node, from: holder, shard: shard, isDead: false), at: now + 1_000_000)
  }

  // MARK: Failure

  private func fail(_ node: Int, _ fault: Scenario.Fault) {
    if nodes[node].fault != nil { return }
    nodes[node].fault = fault
    if node > 0 && nodes[node].hasEnded {
      if !nodes[node].isFinished { unfinishedCount -= 1 }
      nodes[node].isFinished = true
      outcome.failedCount += 1
    }
    if fault != .muted {
      for channel in network.down[node] { network.stop(channel, now: now, changed: schedule) }
    }
    for channel in network.up[node] { network.stop(channel, now: now, changed: schedule) }
    for channel in channels.values where channel.holder == node && fault == .killed {
      for shard in channel.shards {
        queue.add(
          .readFails(channel.receiver, from: node, shard: shard, isDead: true),
          at: now + scenario.latency)
      }
      channel.shards = []
    }
  }

  // MARK: Memory

  /// The heap memory freed when plans and ledgers are released.
  private func measureMemory() {
    func heapBytes() -> Int {
      let info = mallinfo2()
      return info.uordblks + info.hblkhd
    }
    let before = heapBytes()
    for node in nodes.indices.dropFirst() {
      nodes[node].plan = nil
      nodes[node].ledger = nil
    }
    let own = MemoryLayout<DownloadPlan>.size + MemoryLayout<UploadLedger>.size
    outcome.memoryBytes = max(0, before - heapBytes()) / scenario.receiverCount + own
  }
}
