import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// One connection between two devices, made when it is needed and again when it broke.
///
/// Any thread queues slices through `push`; everything below "The driver" belongs to whoever drives
/// the poller.
package final class CQEndpoint: @unchecked Sendable {
  // Unchecked: see above; the rest is synchronized.
  package let device: FakeDevice
  package let peer: FakeTable
  let peerDevice: Int
  package let gate: WriteGate
  let link: SegmentLink
  let mark: UInt64
  package let health = PathHealth(isInUse: true)
  package let description: String
  let poller: CQPoller
  // The transport outlives its paths' use.
  unowned(unsafe) let memory: CQTransport
  let counters: CQCounters

  // Any thread.
  private let inbox = SliceInbox()
  let isScheduled = Atomic<Bool>(false)
  let load = Atomic<Int>(0)
  let moved = Atomic<UInt64>(0)
  private let successor = Lock<PathSuccessor?>(nil)
  private let isRetired = Atomic<Bool>(false)

  // The driver.
  var isActive = false
  /// The earliest deadline of its slices, or earlier.
  private(set) var bound = UInt64.max
  private var pair: FakeQueuePair?
  /// The queue pair is in error, and not everything posted has come back.
  private var isDraining = false
  private var posted: [UInt64: Posted] = [:]
  private var nextID: UInt64 = 1
  private var broken: [(slice: SlicePointer, status: WorkCompletion.Status)] = []
  private var queued = SliceQueue()
  /// Writes that wait until nothing of an earlier one can land where they go.
  private var held = SliceQueue()
  private var fences: [Fence] = []
  private var lastError = MooncakeError(.unreachable, "")
  private var failingSince: UInt64 = 0

  private struct Posted {
    let slice: SlicePointer
    /// Of the local side; 0 if it is the registration's.
    let ownedKey: UInt32
  }

  /// A queue pair in error here, of which the peer's side may still be ready.
  private struct Fence {
    let number: UInt64
    let end: UInt64
    var gateID: UInt64?
    var isOverdue = false
    /// Writes to send again once nothing of them can land.
    var waiting = SliceQueue()
    /// Writes to give back then.
    var givenUp = SliceQueue()
  }

  /// Work requests posted at once.
  private static let depth = 64
  private static let attemptLimit = 5
  private static let fenceNanoseconds: UInt64 = 1_000_000_000
  private static let patienceNanoseconds: UInt64 = 3_000_000_000
  private static let pollNanoseconds: UInt64 = 1_000_000

  init(
    device: FakeDevice, peer: FakeTable, peerDevice: Int, gate: WriteGate, link: SegmentLink,
    poller: CQPoller, memory: CQTransport, counters: CQCounters
  ) {
    self.device = device
    self.peer = peer
    self.peerDevice = peerDevice
    self.gate = gate
    self.link = link
    self.poller = poller
    self.memory = memory
    self.counters = counters
    mark = link.makeMark()
    description = "cq \(device.index)-\(peerDevice) (segment \(link.segmentName))"
  }

  func push(_ slices: consuming SliceQueue, byteCount: Int) {
    load.wrappingAdd(byteCount, ordering: .relaxed)
    inbox.push(slices)
    poller.schedule(self)
  }

  func retire(_ successor: PathSuccessor?) {
    self.successor.withLock { $0 = successor }
    isRetired.store(true, ordering: .releasing)
    poller.schedule(self)
    poller.kick()
  }
}

extension CQEndpoint: WriteGateWaiter {
  package func gateChanged() {
    poller.schedule(self)
    poller.kick()
  }
}

// MARK: - The driver

extension CQEndpoint {
  /// Takes over what other threads queued, and looks at what was held back.
  func takeInbox() {
    var new = inbox.takeAll()
    var cursor = new.first
    while let slice = cursor {
      bound = min(bound, slice.pointee.deadline)
      cursor = slice.pointee.next
    }
    held.append(contentsOf: &queued)
    queued = held.takeAll()
    queued.append(contentsOf: &new)
  }

  /// Whether nothing is left to do, and if so notes that it leaves the list of active ones.
  func leavesIfIdle() -> Bool {
    isActive =
      !queued.isEmpty || !held.isEmpty || !posted.isEmpty || !fences.isEmpty || !broken.isEmpty
    return !isActive
  }

  /// When it needs attention although nothing completes.
  func nextTimer(_ now: UInt64) -> UInt64 {
    var wake = bound
    if !fences.isEmpty {
      wake = min(wake, now + (fences.contains { !$0.isOverdue } ? 1 : 50) * Self.pollNanoseconds)
    }
    if pair == nil, !queued.isEmpty { wake = min(wake, now + Self.pollNanoseconds) }
    return wake
  }

  /// Does what can be done without waiting; returns whether that was anything.
  func progress(_ now: UInt64) -> Bool {
    var isBusy = pollFences(now)
    if isRetired.load(ordering: .acquiring) { handOver(now) }
    if isDraining { return isBusy }
    if pair == nil, !queued.isEmpty, health.isInUse || health.isDue(now) {
      connect(now)
      isBusy = true
    }
    if post(now) { isBusy = true }
    return isBusy
  }

  private func connect(_ now: UInt64) {
    if let new = peer.hasEnded ? nil : device.connect(to: peer, device: peerDevice) {
      pair = new
      poller.watch(new, for: self)
      failingSince = 0
      if health.noteSuccess() { Log.info("\(description): reached again", about: description) }
      return
    }
    if failingSince == 0 { failingSince = now }
    fail(MooncakeError(.unreachable, "\(description): connect: no answer: has the process ended?"))
    if now - failingSince < Self.patienceNanoseconds { return }
    var all = queued.takeAll()
    while let slice = all.popFirst() { giveUp(slice) }
  }

  /// The path rests, and what was not sent goes to one that works, if there is any.
  private func fail(_ error: MooncakeError) {
    lastError = error
    health.noteFailure(error.message)
    link.reportTrouble()
    moveAway()
  }

  private func moveAway() {
    if queued.isEmpty { return }
    let byteCount = queued.byteCount
    link.moveAway(&queued, from: mark, lastError)
    load.wrappingSubtract(byteCount - queued.byteCount, ordering: .relaxed)
  }

  private func post(_ now: UInt64) -> Bool {
    guard let pair, !queued.isEmpty else { return false }
    // A connection that rested may lead to a process that has ended: nothing is sent to that.
    if posted.isEmpty, peer.hasEnded {
      poller.forget(pair)
      self.pair = nil
      return true
    }
    var isAny = false
    while posted.count < Self.depth, let slice = queued.popFirst() {
      isAny = true
      if isDue(slice, now) {
        endDue(slice, "waiting to be posted")
        continue
      }
      switch verdict(slice) {
      case .free: break
      case .pending:
        held.append(slice)
        continue
      case .overdue:
        end(
          slice, .failed(.unreachable),
          "\(describe(slice)): an earlier write there may still be stored")
        continue
      }
      let address = UInt64(UInt(bitPattern: slice.pointee.local))
      let (key, isOwned) = memory.localKey(
        address, UInt64(slice.pointee.length), device: device.index)
      if key == 0 {
        end(slice, .failed(.full), "\(describe(slice)): the device knows too many regions")
        continue
      }
      slice.pointee.wasSent = true
      posted[nextID] = Posted(slice: slice, ownedKey: isOwned ? key : 0)
      device.post(
        WorkRequest(
          id: nextID, pair: pair, opcode: slice.pointee.opcode, local: slice.pointee.local,
          localKey: key, remote: slice.pointee.remote,
          remoteKey: UInt32(truncatingIfNeeded: slice.pointee.transportWord),
          length: slice.pointee.length))
      nextID += 1
    }
    return isAny
  }

  private func verdict(_ slice: SlicePointer) -> WriteGate.Verdict {
    if slice.pointee.opcode == .read || gate.isEmpty { return .free }
    return gate.verdict(slice.pointee.remote, slice.pointee.length, for: self)
  }

  // MARK: Completions

  func complete(_ completion: WorkCompletion, _ now: UInt64) {
    guard let done = posted.removeValue(forKey: completion.id) else { return }
    if done.ownedKey != 0 { memory.endLocalKey(done.ownedKey) }
    if completion.status == .success {
      end(done.slice, .completed, "")
    } else {
      broken.append((done.slice, completion.status))
      isDraining = true
    }
    if isDraining && posted.isEmpty { drained(now) }
  }

  /// Everything posted has come back: no device touches local memory for it any more. What was
  /// written may still land at the peer until its side has left the ready state.
  private func drained(_ now: UInt64) {
    guard let old = pair else { return }
    poller.forget(old)
    pair = nil
    isDraining = false
    counters.failures.wrappingAdd(1, ordering: .relaxed)
    let all = broken
    broken = []
    var fence = Fence(number: old.peerNumber, end: now + Self.fenceNanoseconds)
    let isFenced = peer.closeQueuePair(old.peerNumber)
    let unanswered = all.filter {
      $0.slice.pointee.opcode == .write && $0.status != .remoteAccess
    }.map {
      $0.slice.pointee.remote..<$0.slice.pointee.remote + UInt64($0.slice.pointee.length)
    }
    // Before the end of any of them can be seen.
    if !isFenced, !unanswered.isEmpty { fence.gateID = gate.add(unanswered, isOverdue: false) }
    var again = SliceQueue()
    var fault: MooncakeError?
    for (slice, status) in all {
      let canMove = isFenced || slice.pointee.opcode == .read
      if isDue(slice, now) {
        endDue(slice, "waiting for the device")
        continue
      }
      switch status {
      case .remoteAccess:
        load.wrappingSubtract(slice.pointee.length, ordering: .relaxed)
        link.refused(slice)
        continue
      case .localProtection:
        end(slice, .failed(.invalidArgument), "\(describe(slice)): the local memory is not usable")
        continue
      case .remoteOperation, .retryExceeded:
        slice.pointee.attempts += status == .remoteOperation ? UInt8(Self.attemptLimit) : 1
        lastError = MooncakeError(.unreachable, "\(describe(slice)): \(status)")
        fault = lastError
      case .flushed, .success: break
      }
      if slice.pointee.attempts >= Self.attemptLimit {
        if canMove { giveUp(slice) } else { fence.givenUp.append(slice) }
      } else if canMove {
        again.append(slice)
      } else {
        fence.waiting.append(slice)
      }
    }
    again.append(contentsOf: &queued)
    queued = again
    bound = min(bound, queued.earliestDeadline, fence.waiting.earliestDeadline)
    bound = min(bound, fence.givenUp.earliestDeadline)
    if !isFenced { fences.append(fence) }
    if let fault { fail(fault) }
  }

  /// Lets go what waited for peers' sides that have left the ready state.
  private func pollFences(_ now: UInt64) -> Bool {
    var isAny = false
    for index in fences.indices.reversed() {
      var fence = fences[index]
      if peer.closeQueuePair(fence.number) {
        fences.remove(at: index)
        isAny = true
        if let id = fence.gateID { gate.remove(id) }
        while let slice = fence.givenUp.popFirst() { giveUp(slice) }
        queued.append(contentsOf: &fence.waiting)
        if !health.isInUse { moveAway() }
      } else if !fence.isOverdue, now >= fence.end {
        if let id = fence.gateID { gate.markOverdue(id) }
        fences[index].isOverdue = true
        fences[index].waiting = SliceQueue()
        fences[index].givenUp = SliceQueue()
        fence.waiting.append(contentsOf: &fence.givenUp)
        while let slice = fence.waiting.popFirst() {
          end(
            slice, .failed(.unreachable),
            "\(describe(slice)): the peer may still store it: its queue pair is not closed")
        }
      }
    }
    return isAny
  }

  // MARK: Ends

  private func end(_ slice: SlicePointer, _ outcome: Outcome, _ reason: @autoclosure () -> String) {
    let length = slice.pointee.length
    load.wrappingSubtract(length, ordering: .relaxed)
    if outcome == .completed { moved.wrappingAdd(UInt64(length), ordering: .relaxed) }
    counters.count(slice, outcome)
    Batch.end(slice, outcome, reason: reason())
  }

  private func giveUp(_ slice: SlicePointer) {
    load.wrappingSubtract(slice.pointee.length, ordering: .relaxed)
    link.giveUp(slice, on: mark, lastError)
  }

  private func describe(_ slice: SlicePointer) -> String {
    "\(description): \(slice.pointee.opcode) of \(slice.pointee.length) bytes at 0x"
      + String(slice.pointee.remote, radix: 16)
  }

  private func isDue(_ slice: SlicePointer, _ now: UInt64) -> Bool {
    slice.pointee.deadline <= now || slice.pointee.batch.isCancelRequested
  }

  private func endDue(_ slice: SlicePointer, _ phase: String) {
    if slice.pointee.batch.isCancelRequested {
      end(slice, .canceled, "\(description): canceled")
    } else {
      end(slice, .timeout, "\(describe(slice)): deadline passed while \(phase)")
    }
  }

  /// Ends what is late or canceled. What is posted can only be taken back with all else on the
  /// queue pair.
  func sweep(_ now: UInt64) {
    endDue(&queued, now, "waiting to be posted")
    endDue(&held, now, "waiting for the end of an earlier write there")
    for index in fences.indices {
      endDue(&fences[index].waiting, now, "waiting for the peer to close a queue pair")
      endDue(&fences[index].givenUp, now, "waiting for the peer to close a queue pair")
    }
    if !isDraining, posted.values.contains(where: { isDue($0.slice, now) }) {
      pair?.fail()
      isDraining = true
    }
    bound = min(queued.earliestDeadline, held.earliestDeadline)
    for fence in fences {
      bound = min(bound, fence.waiting.earliestDeadline, fence.givenUp.earliestDeadline)
    }
    // What is draining ends when it has come back.
    if !isDraining { bound = posted.values.reduce(bound) { min($0, $1.slice.pointee.deadline) } }
  }

  private func endDue(_ slices: inout SliceQueue, _ now: UInt64, _ phase: String) {
    var due = slices.removeAll { isDue($0, now) }
    while let slice = due.popFirst() { endDue(slice, phase) }
  }

  /// Ends the use of a retired path: what is queued goes to the successor, if there is one.
  private func handOver(_ now: UInt64) {
    let successor = successor.withLock { $0 }
    if let successor {
      if !posted.isEmpty {
        pair?.fail()
        isDraining = true
        return
      }
      var all = held.takeAll()
      all.append(contentsOf: &queued)
      queued = SliceQueue()
      while let slice = all.popFirst() {
        load.wrappingSubtract(slice.pointee.length, ordering: .relaxed)
        if slice.pointee.wasSent && successor.isRestarted {
          counters.count(slice, .failed(.unreachable))
          Batch.end(
            slice, .failed(.unreachable),
            reason: "\(description): the peer restarted in mid-transfer")
        } else {
          successor.resubmit(slice)
        }
      }
    }
    guard let pair, posted.isEmpty, queued.isEmpty, held.isEmpty, !isDraining else { return }
    poller.forget(pair)
    self.pair = nil
    if !peer.closeQueuePair(pair.peerNumber) {
      fences.append(Fence(number: pair.peerNumber, end: now + Self.fenceNanoseconds))
    }
  }

  /// Ends everything; the devices have stopped.
  func shutDown() {
    takeInbox()
    var all = queued.takeAll()
    all.append(contentsOf: &held)
    for index in fences.indices {
      all.append(contentsOf: &fences[index].waiting)
      all.append(contentsOf: &fences[index].givenUp)
    }
    for done in posted.values { all.append(done.slice) }
    for done in broken { all.append(done.slice) }
    posted = [:]
    broken = []
    while let slice = all.popFirst() {
      end(slice, .canceled, "\(description): engine destroyed")
    }
    if let pair { _ = peer.closeQueuePair(pair.peerNumber) }
    pair = nil
  }
}
