import MooncakeEngine

/// A run that a seed decides: peers, paths, faults and requests.
struct RouterScenario {
  /// What may go wrong.
  enum Kind: Int, CaseIterable {
    /// Nothing does: everything completes.
    case calm
    /// One path always works, and so everything completes.
    case oneSound
    /// Anything.
    case wild
  }

  private static let soundName = "sound"

  let network: FakeNetwork
  let kind: Kind

  init(seed: UInt64, isTraced: Bool = false) {
    network = FakeNetwork(seed: seed, isTraced: isTraced)
    let draw = network.draw(below: 10)
    kind = draw == 0 ? .calm : draw < 4 ? .oneSound : .wild
    network.trace("seed \(seed): \(kind)")
  }

  private func pick(_ range: ClosedRange<Int>) -> Int {
    range.lowerBound + network.draw(below: range.count)
  }

  private func pick(microseconds range: ClosedRange<Int>) -> UInt64 { UInt64(pick(range)) * 1000 }

  /// Returns what the model found.
  func run() -> [String] {
    let drivers = (0..<pick(1...2)).map { _ in network.makeDriver() }
    let peerCount = network.chance(20) ? 2 : 1
    let peers = (0..<peerCount).map { number in
      network.addPeer(places: makePlaces(number, drivers), buffers: makeBuffers())
    }
    if kind == .wild {
      network.failedRefreshes = network.chance(30) ? 40 : 0
      network.hungRefreshes = network.chance(20) ? 30 : 0
      network.refusedThreads = network.chance(10) ? 50 : 0
    }
    planBatches(peers)
    if kind != .calm { planTrouble(peers) }
    network.finish()
    if kind != .wild {
      for (number, request) in network.model.requests.enumerated()
      where request.outcome != .completed {
        network.model.fail(
          "request \(number) ended as \(request.outcome.state), although a path has always worked: "
            + request.batch.failureMessage)
      }
    }
    return network.model.violations
  }

  // MARK: The way there

  private func makeBuffers() -> [Range<Int>] {
    if kind != .wild || network.chance(60) { return [0..<FakeProcess.cellCount] }
    let middle = pick(1...FakeProcess.cellCount - 1)
    return network.chance(50) ? [0..<middle, middle..<FakeProcess.cellCount] : [0..<middle]
  }

  private func makePlaces(_ peer: Int, _ drivers: [FakeDriver]) -> [FakePlace] {
    let transports = network.chance(50) ? ["a"] : ["a", "b"]
    var places: [FakePlace] = []
    for transport in transports {
      let isMemory = network.chance(30)
      for index in 0..<(isMemory ? 1 : pick(1...3)) {
        let place = FakePlace(
          "\(peer)\(transport)\(index)", transport: transport, kind: isMemory ? .memory : .stream,
          driver: drivers[network.draw(below: drivers.count)])
        place.pieceBytes = network.chance(30) ? .max : pick(1...4) * Cells.bytes
        place.weight = pick(1...3)
        place.window = pick(1...6)
        place.latency = pick(microseconds: 5...100)
        if network.chance(30) { place.drainNanoseconds = pick(microseconds: 10...1000) }
        place.failsExhausted = kind == .wild && network.chance(50)
        if kind != .calm { place.faults = makeFaults() }
        if network.chance(30) {
          place.waitsForFences = false
          place.faults.unfenced = 0
        }
        places.append(place)
      }
    }
    if kind == .oneSound {
      let isSibling = places.last!.kind == .stream && network.chance(50)
      let sound = FakePlace(
        Self.soundName, transport: isSibling ? transports.last! : "sound", kind: .stream,
        driver: drivers[0])
      sound.pieceBytes = pick(1...4) * Cells.bytes
      sound.window = 8
      places.insert(sound, at: pick(0...places.count))
    }
    return places
  }

  private func makeFaults() -> FakePlace.Faults {
    var faults = FakePlace.Faults()
    if network.chance(30) { return faults }
    if network.chance(50) { faults.deadly = pick(1...30) }
    if network.chance(30) { faults.lost = pick(1...20) }
    if network.chance(30) { faults.slow = pick(1...20) }
    if network.chance(30) { faults.failedConnects = pick(10...100) }
    if network.chance(20) { faults.fullQueues = pick(10...100) }
    if network.chance(60) { faults.unfenced = pick(10...100) }
    if kind == .wild {
      if network.chance(30) { faults.refused = pick(1...20) }
      if network.chance(30) { faults.lateFences = pick(10...100) }
      if network.chance(20) { faults.missingFences = pick(10...100) }
    }
    return faults
  }

  // MARK: What is asked for

  private func planBatches(_ peers: [FakeTarget]) {
    for _ in 0..<pick(1...3) {
      let start = network.chance(50) ? 0 : pick(microseconds: 0...5000)
      network.time.after(start) { submit(peers, pick(0...2)) }
    }
  }

  /// Submits a batch, and others to the same cells after its end.
  private func submit(_ peers: [FakeTarget], _ followers: Int, after former: Range<Int>? = nil) {
    let count = network.chance(60) ? pick(1...4) : pick(1...12)
    let batch = network.makeBatch(count)
    let limit = kind == .wild && network.chance(60) ? pick(microseconds: 100...50_000) : nil
    var cells = former ?? 0..<0
    let requests = (0..<count).map { index in
      if index > 0 || former == nil { cells = makeCells() }
      return FakeNetwork.Request(
        opcode: network.chance(former == nil ? 50 : 70) ? .write : .read,
        peer: peers[network.draw(below: peers.count)], cells: cells)
    }
    network.submit(
      requests, to: batch, within: limit ?? 5_000_000_000, isAsynchronous: network.chance(70))
    if kind == .wild, network.chance(20) {
      network.time.after(pick(microseconds: 0...30_000)) { network.cancel(batch) }
    }
    if followers > 0 { follow(batch, peers, followers, requests[0].cells) }
  }

  private func follow(
    _ batch: Batch, _ peers: [FakeTarget], _ followers: Int, _ cells: Range<Int>
  ) {
    if batch.isTerminal { return submit(peers, followers - 1, after: cells) }
    network.time.after(200_000) { follow(batch, peers, followers, cells) }
  }

  private func makeCells() -> Range<Int> {
    let count =
      network.chance(50)
      ? pick(1...3) : network.chance(kind == .wild ? 3 : 0) ? 0 : pick(1...40)
    let first = pick(0...FakeProcess.cellCount - count)
    return first..<first + count
  }

  // MARK: What goes wrong

  private func planTrouble(_ peers: [FakeTarget]) {
    for _ in 0..<pick(0...3) {
      let peer = peers[network.draw(below: peers.count)]
      let start = pick(microseconds: 0...15_000)
      network.time.after(start) { cause(peer) }
    }
  }

  private func cause(_ peer: FakeTarget) {
    let draw = pick(0...99)
    let unsound = peer.places.filter { $0.name != Self.soundName }
    let place = unsound[pick(0...unsound.count - 1)]
    if draw < 50 {
      network.goDown(place, for: pick(microseconds: 100...200_000))
    } else if draw < 65 {
      // The same process elsewhere: another port, another socket.
      let index = peer.places.firstIndex { $0 === place }!
      peer.places[index] = place.moved()
      network.trace("\(place.name) moves")
      if network.chance(70) { refresh(peer) }
    } else if draw < 80 {
      let more = place.moved()
      peer.places.insert(more, at: pick(0...peer.places.count))
      network.trace("\(more.name) is added")
      refresh(peer)
    } else if kind == .oneSound {
      refresh(peer)
    } else if draw < 88 {
      network.restart(peer)
      if network.chance(30) { refresh(peer) }
    } else if draw < 96 {
      peer.process.buffers = makeBuffers()
      network.trace("\(peer.name) has \(peer.process.buffers)")
    } else if draw < 98 {
      network.closeSegment(of: peer)
    } else {
      network.close()
    }
  }

  private func refresh(_ peer: FakeTarget) {
    guard let segment = try? network.router.segments.segment(peer.segment) else { return }
    network.refresh(peer, segment)
  }
}
