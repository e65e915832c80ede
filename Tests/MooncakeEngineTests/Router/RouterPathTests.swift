import MooncakeBase
import MooncakeEngine
import Testing

/// What the router makes of several paths, each case by itself.
struct RouterPathTests {
  private let network = FakeNetwork(seed: 1)

  private static let millisecond: UInt64 = 1_000_000

  private func stream(_ name: String, _ transport: String, _ driver: FakeDriver) -> FakePlace {
    let place = FakePlace(name, transport: transport, kind: .stream, driver: driver)
    place.pieceBytes = Cells.bytes
    return place
  }

  private func memory(_ name: String, _ transport: String, _ driver: FakeDriver) -> FakePlace {
    FakePlace(name, transport: transport, kind: .memory, driver: driver)
  }

  private func movedBytes(_ place: FakePlace) -> UInt64 {
    network.streams.reduce(0) { $0 + ($1.place === place ? $1.movedBytes : 0) }
      + network.memories.reduce(0) { $0 + ($1.place === place ? $1.movedBytes : 0) }
  }

  /// Submits one batch; its requests may take five seconds.
  private func submit(
    _ target: FakeTarget, _ cells: [Range<Int>], opcode: Opcode = .write
  ) -> Batch {
    let batch = network.makeBatch(cells.count)
    network.submit(
      cells.map { FakeNetwork.Request(opcode: opcode, peer: target, cells: $0) }, to: batch,
      within: 5000 * Self.millisecond)
    return batch
  }

  private func run(for nanoseconds: UInt64) {
    network.time.run(until: network.time.now + nanoseconds)
  }

  private func expectSound(sourceLocation: SourceLocation = #_sourceLocation) {
    network.finish()
    #expect(network.model.violations.isEmpty, sourceLocation: sourceLocation)
  }

  @Test(arguments: [0, 100])
  func bulkGoesOnWithoutADeadPath(unfenced: Int) {
    let driver = network.makeDriver()
    let places = [stream("a0", "a", driver), stream("a1", "a", driver)]
    for place in places { place.faults.unfenced = unfenced }
    let target = network.addPeer(places: places)
    let batch = submit(target, Array(repeating: 0..<64, count: 12))
    run(for: Self.millisecond)
    #expect(!batch.isTerminal)
    #expect(places.allSatisfy { movedBytes($0) > 0 })
    network.goDown(places[0], for: 4000 * Self.millisecond)
    run(for: 100 * Self.millisecond)
    #expect(batch.status.state == .completed, "\(batch.failureMessage)")
    #expect(movedBytes(places[1]) > movedBytes(places[0]))
    expectSound()
  }

  @Test func orderOfPreference() {
    let driver = network.makeDriver()
    let places = [memory("a", "a", driver), stream("b", "b", driver), stream("c", "c", driver)]
    let target = network.addPeer(places: places)
    func move() -> [Bool] {
      let before = places.map(movedBytes)
      let batch = submit(target, [3..<20, 30..<31])
      run(for: 10 * Self.millisecond)
      #expect(batch.status.state == .completed, "\(batch.failureMessage)")
      return zip(places.map(movedBytes), before).map { $0 > $1 }
    }
    #expect(move() == [true, false, false])
    network.goDown(places[0], for: 150 * Self.millisecond)
    #expect(move() == [false, true, false])
    network.goDown(places[1], for: 150 * Self.millisecond)
    #expect(move() == [false, false, true])
    // Both come back by themselves once slices ask for them, and their turns with them.
    run(for: 150 * Self.millisecond)
    for _ in 0..<30 { _ = move() }
    #expect(move() == [true, false, false])
    network.goDown(places[0], for: 4000 * Self.millisecond)
    #expect(move() == [false, true, false])
    expectSound()
  }

  @Test func oneMessageWithEveryReason() {
    let driver = network.makeDriver()
    let places = [memory("a", "a", driver), stream("b", "b", driver), stream("c", "c", driver)]
    let target = network.addPeer(places: places)
    for place in places { network.goDown(place, for: 10_000 * Self.millisecond) }
    let batch = submit(target, [0..<1])
    run(for: 1000 * Self.millisecond)
    #expect(batch.status.state == .failed && batch.status.error == .unreachable)
    let message = batch.failureMessage
    for reason in [
      "a: cannot be reached", "b: path b: connect: refused", "path c: connect: refused",
    ] {
      let parts = message.split(separator: reason, omittingEmptySubsequences: false)
      #expect(parts.count == 2, "\(reason) in: \(message)")
    }
    expectSound()
  }

  @Test func bulkIsSpreadByWeight() {
    let driver = network.makeDriver()
    let places = [stream("a0", "a", driver), stream("a1", "a", driver), stream("b", "b", driver)]
    places[0].weight = 3
    let target = network.addPeer(places: places)
    let batch = submit(target, Array(repeating: 0..<64, count: 5), opcode: .read)
    run(for: 1000 * Self.millisecond)
    #expect(batch.status.state == .completed)
    let cells = places.map { Int(movedBytes($0)) / Cells.bytes }
    #expect((236...244).contains(cells[0]), "\(cells)")
    #expect(cells[0] + cells[1] == 320 && cells[2] == 0, "\(cells)")
    expectSound()
  }

  /// A path that is made at a refresh is another one than those that stay.
  @Test func newPathBesideAKeptOne() throws {
    let driver = network.makeDriver()
    let kept = stream("b", "b", driver)
    let target = network.addPeer(places: [kept])
    let new = memory("a", "a", driver)
    new.faults.refused = 100
    target.places.insert(new, at: 0)
    network.refresh(target, try network.router.segments.segment(target.segment))
    let batch = submit(target, [0..<1, 5..<30])
    run(for: 20 * Self.millisecond)
    #expect(batch.status.state == .completed, "\(batch.failureMessage)")
    #expect(network.refreshCount == 0 && movedBytes(kept) == UInt64(26 * Cells.bytes))
    expectSound()
  }

  /// What one path refuses goes to the one that was chosen first, and not back.
  @Test func siblingThatRefuses() {
    let driver = network.makeDriver()
    let places = [stream("a0", "a", driver), stream("a1", "a", driver)]
    for place in places { place.pieceBytes = .max }
    places[1].faults.fullQueues = 100
    let target = network.addPeer(places: places)
    let batch = submit(target, Array(repeating: 0..<40, count: 6))
    run(for: 20 * Self.millisecond)
    #expect(batch.status.state == .completed, "\(batch.failureMessage)")
    #expect(network.refreshCount == 0 && movedBytes(places[1]) == 0)
    expectSound()
  }

  /// Pieces of one request that reach two lives of a process make no whole.
  @Test(arguments: [Opcode.read, .write])
  func restartBetweenPieces(opcode: Opcode) throws {
    let driver = network.makeDriver()
    let places = [stream("a0", "a", driver), stream("a1", "a", driver)]
    places[1].connectNanoseconds = 10 * Self.millisecond
    let target = network.addPeer(places: places)
    let batch = submit(target, [0..<40], opcode: opcode)
    run(for: 5 * Self.millisecond)
    // One path has moved its share, and nothing of the other's was sent.
    #expect(places.map(movedBytes) == [UInt64(20 * Cells.bytes), 0])
    network.restart(target)
    network.refresh(target, try network.router.segments.segment(target.segment))
    run(for: 100 * Self.millisecond)
    #expect(batch.status.state == .failed && batch.status.error == .unreachable)
    #expect(batch.failureMessage.contains("restarted"))
    expectSound()
  }

  /// A request that nothing was sent of goes to the new process whole.
  @Test func restartBeforeTheFirstPiece() throws {
    let place = stream("a", "a", network.makeDriver())
    let target = network.addPeer(places: [place])
    network.restart(target)
    let batch = submit(target, [0..<40])
    run(for: 100 * Self.millisecond)
    #expect(batch.status.state == .completed, "\(batch.failureMessage)")
    expectSound()
  }
}
