import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// A path that copies, small runs in the submitter's thread. It looks ranges up itself, and is
/// there or not; what it cannot copy goes another way.
final class FakeMemoryPath: Path, @unchecked Sendable {
  // Unchecked: a simulation has one thread.
  let place: FakePlace
  let process: FakeProcess
  let link: SegmentLink
  let mark: UInt64
  let health = PathHealth(isInUse: true)
  private(set) var load = 0
  private(set) var movedBytes: UInt64 = 0
  private unowned let network: FakeNetwork
  private var isReached = true
  private var isRetired = false
  private var queue = SliceQueue()
  private var copying: FakeFlight?

  init(_ place: FakePlace, _ process: FakeProcess, link: SegmentLink, network: FakeNetwork) {
    self.place = place
    self.process = process
    self.link = link
    self.network = network
    mark = link.makeMark()
    network.helper.paths.append(self)
  }

  var transportName: String { place.transport }
  var description: String { "path \(place.name)" }
  var gate: WriteGate? { nil }
  var isUsable: Bool { isReached && !isRetired }
  var isEmpty: Bool { queue.isEmpty && copying == nil }

  var traits: PathTraits {
    var traits = PathTraits()
    traits.checksRanges = true
    traits.pieceBytes = place.pieceBytes
    traits.weight = place.weight
    return traits
  }

  private func trace(_ text: @autoclosure () -> String) {
    network.trace("\(place.name): \(text())")
  }

  private func refuses(_ slice: SlicePointer) -> Bool {
    !process.isAlive
      || !process.allows(Cells.remote(slice.pointee.remote, slice.pointee.length))
      || network.chance(place.faults.refused)
  }

  func check(_ run: inout SliceRun) {
    guard isUsable else { return }
    var slices = run.takeSlices()
    while let slice = slices.popFirst() {
      if refuses(slice) { run.refused.append(slice) } else { run.append(slice) }
    }
  }

  func submit(_ run: inout SliceRun) {
    let isInline = run.byteCount <= place.inlineBytes
    while let slice = run.popFirst() {
      if !isUsable || (isInline && refuses(slice)) {
        run.refused.append(slice)
      } else if isInline {
        let flight = start(slice)
        load += slice.pointee.length
        finish(flight)
      } else {
        slice.pointee.batch.use(DriverSet(bit: network.helper.bit))
        load += slice.pointee.length
        queue.append(slice)
        network.helper.watch(slice)
      }
    }
    copyNext()
  }

  // MARK: Copying

  private func start(_ slice: SlicePointer) -> FakeFlight {
    let request = network.model.request(of: slice)
    let local = network.model.localCells(of: slice)
    let flight = FakeFlight(
      slice, request: request, local: local,
      remote: Cells.remote(slice.pointee.remote, slice.pointee.length),
      values: slice.pointee.opcode == .write ? network.model.take(request, local) : [])
    network.model.noteSend(flight, to: process)
    trace("copies \(flight.opcode) \(request) \(flight.remote)")
    return flight
  }

  private func copyNext() {
    if copying != nil { return }
    guard let slice = queue.popFirst() else { return }
    let flight = start(slice)
    copying = flight
    let cost = place.latency + UInt64(flight.remote.count) * place.cellNanoseconds
    network.time.after(cost) { [self] in
      guard copying === flight else { return }
      copying = nil
      if refuses(slice) { giveBack(flight) } else { finish(flight) }
      copyNext()
    }
  }

  private func finish(_ flight: FakeFlight) {
    guard let slice = flight.slice else { return }
    flight.hasLanded = true
    if flight.opcode == .read {
      flight.values = process.values(flight.remote)
      network.model.arrive(flight)
    } else {
      network.model.land(flight, in: process)
    }
    flight.slice = nil
    movedBytes += UInt64(slice.pointee.length)
    end(slice, .completed)
  }

  private func giveBack(_ flight: FakeFlight) {
    guard let slice = flight.slice else { return }
    flight.slice = nil
    flight.isDropped = true
    giveBack(slice)
  }

  private func giveBack(_ slice: SlicePointer) {
    load -= slice.pointee.length
    trace("gives back")
    link.refusedHere(slice, on: mark)
  }

  private func end(_ slice: SlicePointer, _ outcome: Outcome, _ reason: String = "") {
    load -= slice.pointee.length
    Batch.end(slice, outcome, reason: reason)
  }

  // MARK: Losing the process and coming back

  func goDown(until: UInt64) {
    place.downUntil = until
    lose("cannot be reached")
  }

  func processEnded() { lose("its process ended") }

  private func lose(_ why: String) {
    trace("is lost: \(why)")
    isReached = false
    health.noteFailure(why, network.time.now)
    if let flight = copying {
      copying = nil
      giveBack(flight)
    }
    var left = queue.takeAll()
    while let slice = left.popFirst() { giveBack(slice) }
  }

  func retryIfDue(_ now: UInt64) {
    guard health.isDue(now), health.beginAttempt(now) else { return }
    network.time.after(200_000) { [self] in
      if isRetired || !process.isAlive || network.time.now < place.downUntil {
        health.noteFailure("cannot be reached", network.time.now)
      } else {
        trace("is back")
        isReached = true
        health.noteSuccess()
      }
    }
  }

  func retire(successor: PathSuccessor?) {
    // What is queued is still copied.
    trace("retired")
    isRetired = true
  }

  func sweep() {
    let now = network.time.now
    var due = queue.removeAll {
      $0.pointee.deadline <= now || $0.pointee.batch.isCancelRequested
    }
    while let slice = due.popFirst() {
      let isCanceled = slice.pointee.batch.isCancelRequested
      end(slice, isCanceled ? .canceled : .timeout, "\(description): due")
    }
  }

  var earliestDeadline: UInt64 { queue.earliestDeadline }

  func shutDown() {
    if let flight = copying, let slice = flight.slice {
      copying = nil
      flight.slice = nil
      end(slice, .canceled, "\(description): destroyed")
    }
    var left = queue.takeAll()
    while let slice = left.popFirst() { end(slice, .canceled, "\(description): destroyed") }
  }
}

/// What the queues of copies share: their deadlines. Copies go on by themselves.
final class FakeCopyQueue: Driver, @unchecked Sendable {
  // Unchecked: a simulation has one thread.
  static let isExclusive = false

  private unowned let network: FakeNetwork
  private(set) var bit = 0
  private var nextSweep = UInt64.max
  var paths: [FakeMemoryPath] = []

  init(_ network: FakeNetwork) {
    self.network = network
    bit = network.router.drivers.add(self) ?? 0
  }

  /// Lets go of its paths, which know it as well.
  func end() { paths = [] }

  func kick() {}
  func nudge() {}
  func requestSweep() { network.time.after(0) { [self] in sweep() } }
  func pollIfFree() -> Bool { false }
  func driveIfFree(until deadline: Deadline, isDone: () -> Bool) -> Bool { false }

  func watch(_ slice: SlicePointer) {
    let due = slice.pointee.batch.isCancelRequested ? 0 : slice.pointee.deadline
    if due >= nextSweep { return }
    nextSweep = due
    network.time.at(due) { [self] in sweep() }
  }

  private func sweep() {
    nextSweep = .max
    for path in paths { path.sweep() }
    let next = paths.reduce(UInt64.max) { min($0, $1.earliestDeadline) }
    if next < nextSweep {
      nextSweep = next
      network.time.at(next) { [self] in sweep() }
    }
  }
}
