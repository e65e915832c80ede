import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// A path with a connection that breaks.
final class FakeStreamPath: Path, @unchecked Sendable {
  // Unchecked: a simulation has one thread.
  private enum State: Equatable {
    case idle, connecting, connected
    case resting(until: UInt64)
  }

  let place: FakePlace
  let process: FakeProcess
  let link: SegmentLink
  let mark: UInt64
  let health = PathHealth(isInUse: true)
  private(set) var load = 0
  private(set) var movedBytes: UInt64 = 0
  private(set) var isRetired = false
  private unowned let network: FakeNetwork

  private var state = State.idle
  /// Changes with each connection: what was arranged for an earlier one is void.
  private var epoch = 0
  private var inbox = SliceQueue()
  private var queue = SliceQueue()
  /// Writes that wait for the fence of an earlier one.
  private var held = SliceQueue()
  private var flights: [FakeFlight] = []
  /// Reads of broken connections whose data may still arrive.
  private var draining: [FakeFlight] = []
  private var successor: PathSuccessor?
  private var restNanoseconds = PathHealth.firstRestNanoseconds
  private var failureCount = 0

  private static let attemptLimit = 4

  init(_ place: FakePlace, _ process: FakeProcess, link: SegmentLink, network: FakeNetwork) {
    self.place = place
    self.process = process
    self.link = link
    self.network = network
    mark = link.makeMark()
    place.driver.paths.append(self)
  }

  var transportName: String { place.transport }
  var description: String { "path \(place.name)" }
  var gate: WriteGate? { process.gate }
  var isUsable: Bool { health.isInUse }

  func mayProbe(_ now: UInt64) -> Bool { health.beginProbe(now, until: now + 1_000_000) }

  var traits: PathTraits {
    var traits = PathTraits()
    traits.waitsForPeer = true
    traits.waitsForFences = place.waitsForFences
    traits.pieceBytes = place.pieceBytes
    traits.weight = place.weight
    return traits
  }

  var isEmpty: Bool {
    inbox.isEmpty && queue.isEmpty && held.isEmpty && flights.isEmpty && draining.isEmpty
  }

  var earliestDeadline: UInt64 {
    let sent = flights.reduce(UInt64.max) { min($0, $1.slice?.pointee.deadline ?? .max) }
    return min(
      sent, inbox.earliestDeadline, min(queue.earliestDeadline, held.earliestDeadline))
  }

  private func trace(_ text: @autoclosure () -> String) {
    network.trace("\(place.name): \(text())")
  }

  func submit(_ run: inout SliceRun) {
    run.drivers.insert(place.driver.bit)
    while let slice = run.popFirst() {
      if network.chance(place.faults.fullQueues) {
        run.refused.append(slice)
        continue
      }
      load += slice.pointee.length
      inbox.append(slice)
      place.driver.watch(slice)
    }
    place.driver.schedule(self)
  }

  func retire(successor: PathSuccessor?) {
    trace("retired")
    isRetired = true
    self.successor = successor
    network.time.after(0) { [self] in retireNow() }
  }

  // MARK: Sending

  func progress() {
    takeInbox()
    if isRetired { return retireNow() }
    pump()
  }

  private func takeInbox() {
    var new = inbox.takeAll()
    if place.waitsForFences, !process.gate.isEmpty { hold(&new) }
    queue.append(contentsOf: &new)
  }

  private func pump() {
    switch state {
    case .idle: if !queue.isEmpty { connect() }
    case .resting(let until): if !queue.isEmpty, network.time.now >= until { connect() }
    case .connecting: break
    case .connected:
      while flights.count < place.window, let slice = queue.popFirst() { send(slice) }
    }
  }

  private func connect() {
    state = .connecting
    epoch += 1
    let mine = epoch
    network.time.after(place.connectNanoseconds) { [self] in
      guard epoch == mine else { return }
      if !process.isAlive || network.time.now < place.downUntil
        || network.chance(place.faults.failedConnects)
      {
        trace("cannot connect")
        return rest(MooncakeError(.unreachable, "\(description): connect: refused"))
      }
      trace("connected")
      state = .connected
      failureCount = 0
      restNanoseconds = PathHealth.firstRestNanoseconds
      health.noteSuccess()
      pump()
    }
  }

  private func send(_ slice: SlicePointer) {
    let request = network.model.request(of: slice)
    let local = network.model.localCells(of: slice)
    let flight = FakeFlight(
      slice, request: request, local: local,
      remote: Cells.remote(slice.pointee.remote, slice.pointee.length),
      values: slice.pointee.opcode == .write ? network.model.take(request, local) : [])
    network.model.noteSend(flight, to: process)
    trace("sends \(flight.opcode) \(request) \(flight.remote)")
    flights.append(flight)
    let faults = place.faults
    let mine = epoch
    var latency = place.latency + UInt64(network.draw(below: Int(place.latency)))
    latency += UInt64(flight.remote.count) * place.cellNanoseconds
    if network.chance(faults.slow) { latency *= 50 }
    if network.chance(faults.deadly) {
      network.time.after(latency / 2) { [self] in
        if epoch == mine { breakConnection("reset") }
      }
    }
    if network.chance(faults.lost) {
      if flight.opcode == .write, network.chance(50) {
        network.time.after(latency * UInt64(1 + network.draw(below: 500))) { [self] in
          landed(flight)
        }
      }
    } else if network.chance(faults.refused) {
      network.time.after(latency) { [self] in if epoch == mine { refuse(flight) } }
    } else {
      network.time.after(latency) { [self] in
        guard landed(flight) else { return }
        network.time.after(latency / 2) { [self] in arrived(flight) }
      }
    }
    network.time.after(place.answerLimit) { [self] in
      if epoch == mine, flight.slice != nil { breakConnection("no answer") }
    }
  }

  /// Returns whether there will be an answer.
  @discardableResult
  private func landed(_ flight: FakeFlight) -> Bool {
    guard !flight.isDropped, process.isAlive else { return false }
    guard process.allows(flight.remote) else {
      if flight.slice != nil, flights.contains(where: { $0 === flight }) { refuse(flight) }
      return false
    }
    flight.hasLanded = true
    if flight.opcode == .read {
      flight.values = process.values(flight.remote)
    } else {
      trace("lands write \(flight.request) \(flight.remote)")
      network.model.land(flight, in: process)
    }
    return true
  }

  private func arrived(_ flight: FakeFlight) {
    guard flight.slice != nil, !flight.isDropped else { return }
    if flight.opcode == .read { network.model.arrive(flight) }
    network.time.after(1000) { [self] in complete(flight) }
  }

  private func complete(_ flight: FakeFlight) {
    guard let slice = flight.slice, let index = flights.firstIndex(where: { $0 === flight }) else {
      return
    }
    trace("completes \(flight.opcode) \(flight.request) \(flight.remote)")
    flights.remove(at: index)
    flight.slice = nil
    movedBytes += UInt64(slice.pointee.length)
    end(slice, .completed)
    pump()
  }

  private func end(_ slice: SlicePointer, _ outcome: Outcome, _ reason: String = "") {
    load -= slice.pointee.length
    Batch.end(slice, outcome, reason: reason)
  }

  private func refuse(_ flight: FakeFlight) {
    guard let slice = flight.slice else { return }
    trace("refuses \(flight.opcode) \(flight.request) \(flight.remote)")
    // Of a refused request nothing lands, and the peer reads none behind it.
    flights.removeAll { $0 === flight }
    flight.slice = nil
    flight.isDropped = true
    leave(isFenced: true, countsAttempt: false)
    load -= slice.pointee.length
    link.refused(slice)
    kickIfNeeded()
  }

  private func kickIfNeeded() {
    place.driver.schedule(self)
    place.driver.kick()
  }

  // MARK: The end of a connection

  /// The network between has failed until then.
  func goDown(until: UInt64) {
    place.downUntil = until
    if state == .connected { breakConnection("network down") }
  }

  /// The process has ended, and nothing lands in its memory any more.
  func processEnded() {
    if state == .connected { breakConnection("process ended") }
  }

  private func breakConnection(_ why: String) {
    guard state == .connected else { return }
    trace("breaks: \(why)")
    let error = MooncakeError(.unreachable, "\(description): \(why)")
    leave(isFenced: !network.chance(place.faults.unfenced), countsAttempt: true)
    rest(error)
  }

  /// Takes the connection out of use. Its reads are quiet, perhaps later; its writes wait for their
  /// fence.
  private func leave(isFenced: Bool, countsAttempt: Bool) {
    epoch += 1
    state = .idle
    var returned = SliceQueue()
    var unfenced: [FakeFlight] = []
    var exhausted = SliceQueue()
    let sent = flights
    flights = []
    for flight in sent {
      guard let slice = flight.slice else { continue }
      slice.pointee.wasSent = true
      if countsAttempt { slice.pointee.attempts += 1 }
      if flight.opcode == .read && place.drainNanoseconds > 0 {
        draining.append(flight)
        continue
      }
      flight.slice = nil
      if flight.opcode == .read || isFenced {
        flight.isDropped = true
      } else if !flight.isDropped {
        unfenced.append(flight)
      }
      if slice.pointee.attempts >= Self.attemptLimit {
        exhausted.append(slice)
      } else {
        returned.append(slice)
      }
    }
    if !draining.isEmpty { drainSoon() }
    if !unfenced.isEmpty { awaitFence(unfenced) }
    returned.append(contentsOf: &queue)
    queue = returned
    let error = MooncakeError(.unreachable, "\(description): failed too often")
    while let slice = exhausted.popFirst() {
      if slice.pointee.opcode == .read || isFenced {
        giveUp(slice, error)
      } else if place.failsExhausted {
        end(slice, .failed(.unreachable), error.message)
      } else {
        queue.append(slice)
      }
    }
    if !unfenced.isEmpty { hold(&queue) }
  }

  private func giveUp(_ slice: SlicePointer, _ error: MooncakeError) {
    load -= slice.pointee.length
    link.giveUp(slice, on: mark, error)
  }

  private func drainSoon() {
    let mine = draining
    network.time.after(place.drainNanoseconds) { [self] in
      for flight in mine {
        guard let index = draining.firstIndex(where: { $0 === flight }) else { continue }
        draining.remove(at: index)
        guard let slice = flight.slice else { continue }
        flight.isDropped = true
        flight.slice = nil
        queue.append(slice)
      }
      sweep()
      kickIfNeeded()
    }
  }

  /// Keeps what may still land in the gate until it cannot, or until the peer has had its time.
  private func awaitFence(_ unfenced: [FakeFlight]) {
    for flight in unfenced { flight.isGated = true }
    process.unfenced += unfenced
    let entry = process.gate.add(unfenced.map(\.addresses), isOverdue: false)
    trace("waits for a fence, \(entry)")
    let gate = process.gate
    let lift = { [self] in
      trace("is fenced, \(entry)")
      for flight in unfenced {
        flight.isDropped = true
        flight.isGated = false
      }
      process.unfenced.removeAll { $0.isDropped }
      gate.remove(entry)
    }
    let isMissing = network.chance(place.faults.missingFences)
    if isMissing || network.chance(place.faults.lateFences) {
      network.time.after(30_000_000) {
        self.trace("has no fence in time, \(entry)")
        gate.markOverdue(entry)
      }
      if isMissing { return }
      network.time.after(UInt64(31_000_000 + network.draw(below: 200_000_000)), lift)
    } else {
      network.time.after(UInt64(network.draw(below: 5_000_000)), lift)
    }
  }

  /// Waits before the next connect; what another path can move goes there.
  private func rest(_ error: MooncakeError) {
    let until = network.time.now + restNanoseconds
    restNanoseconds = min(2 * restNanoseconds, 80_000_000)
    state = .resting(until: until)
    epoch += 1
    failureCount += 1
    health.noteFailure(error.message, network.time.now)
    link.reportTrouble()
    if failureCount >= place.connectLimit {
      var queued = queue.takeAll()
      while let slice = queued.popFirst() { giveUp(slice, error) }
    } else if !queue.isEmpty {
      var queued = queue.takeAll()
      let byteCount = queued.byteCount
      link.moveAway(&queued, from: mark, error)
      load -= byteCount - queued.byteCount
      queue.append(contentsOf: &queued)
    }
    network.time.at(until) { [self] in progress() }
  }

  // MARK: Waiting for fences

  private func hold(_ slices: inout SliceQueue) {
    var free = SliceQueue()
    while let slice = slices.popFirst() {
      let isRead = slice.pointee.opcode == .read
      switch isRead
        ? .free : process.gate.verdict(slice.pointee.remote, slice.pointee.length, for: self)
      {
      case .free: free.append(slice)
      case .pending: held.append(slice)
      case .overdue:
        end(slice, .failed(.unreachable), "\(description): an earlier write may still land")
      }
    }
    slices = free
  }

  private func reviewHeld() {
    var waiting = held.takeAll()
    hold(&waiting)
    queue.append(contentsOf: &waiting)
    progress()
  }

  // MARK: Deadlines, cancellation, retirement

  func sweep() {
    let now = network.time.now
    func isDue(_ slice: SlicePointer) -> Bool {
      slice.pointee.deadline <= now || slice.pointee.batch.isCancelRequested
    }
    takeInbox()
    if flights.contains(where: { $0.slice.map(isDue) ?? false }) {
      trace("is left")
      leave(isFenced: !network.chance(place.faults.unfenced), countsAttempt: false)
      kickIfNeeded()
    }
    var due = held.removeAll(where: isDue)
    var more = queue.removeAll(where: isDue)
    due.append(contentsOf: &more)
    while let slice = due.popFirst() {
      let isCanceled = slice.pointee.batch.isCancelRequested
      end(slice, isCanceled ? .canceled : .timeout, "\(description): due")
    }
    if !queue.isEmpty { kickIfNeeded() }
  }

  private func retireNow() {
    takeInbox()
    guard let successor else { return pump() }
    if !flights.isEmpty {
      leave(isFenced: !network.chance(place.faults.unfenced), countsAttempt: false)
    }
    epoch += 1
    state = .idle
    var moved = queue.takeAll()
    while let slice = moved.popFirst() {
      load -= slice.pointee.length
      if slice.pointee.wasSent && successor.isRestarted {
        Batch.end(slice, .failed(.unreachable), reason: "\(description): the peer restarted")
      } else {
        successor.resubmit(slice)
      }
    }
  }

  /// The engine is destroyed.
  func shutDown() {
    for flight in flights + draining {
      guard let slice = flight.slice else { continue }
      flight.slice = nil
      flight.isDropped = true
      end(slice, .canceled, "\(description): destroyed")
    }
    flights = []
    draining = []
    queue.append(contentsOf: &inbox)
    queue.append(contentsOf: &held)
    var left = queue.takeAll()
    while let slice = left.popFirst() { end(slice, .canceled, "\(description): destroyed") }
    epoch += 1
    state = .idle
  }
}

extension FakeStreamPath: WriteGateWaiter {
  func gateChanged() { network.time.after(0) { [self] in reviewHeld() } }
}
