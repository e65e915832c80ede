import MooncakeBase
import MooncakeSystem
import Synchronization

// How connections end, and what becomes of the slices on them.
extension TCPEndpoint {
  /// With so many failed connections a slice fails.
  private static let attemptLimit = 5

  /// Who has ended a connection.
  enum Ending {
    /// The peer has closed it, or said that it stores nothing more of it.
    case fenced
    /// On this side only: the peer may still be storing.
    case unfenced
    /// The kernel has given it up, and with it the way to learn what the peer still stores.
    case lost
  }

  /// Takes the connection out of use and decides what becomes of its slices. Reads may be sent
  /// again at once, for nothing of the connection reaches local memory any more. Writes wait until
  /// nothing of them can land at the target.
  func disconnect(_ error: MooncakeError, _ ending: Ending, countsAttempt: Bool = true) {
    assert(isConnected)
    loop.counters.clientDisconnects.wrappingAdd(1, ordering: .relaxed)
    lastError = error
    let onWireCount = window.onWireCount
    let unanswered = ending == .fenced ? [] : window.unansweredWrites()
    if unanswered.isEmpty {
      closeSocket()
    } else if ending == .unfenced, let socket = takeSocket() {
      loop.fence(socket, peer, unanswered: unanswered)
    } else {
      closeSocket()
      _ = peer.gate.add(unanswered, isOverdue: true)
    }
    if countsAttempt { countAttempt(onWireCount, canMove: unanswered.isEmpty) }
    if !unanswered.isEmpty {
      var slices = window.takeAll()
      hold(&slices)
      window.append(contentsOf: &slices)
    }
    if countsAttempt { rest() }
  }

  /// Slices on the wire, the first ones, may be tried again, but not forever. Of reads nothing can
  /// land any more; of writes only if `canMove`.
  private func countAttempt(_ onWireCount: Int, canMove: Bool) {
    var left = onWireCount
    var exhausted = window.removeAll { slice in
      defer { left -= 1 }
      guard left > 0 else { return false }
      slice.pointee.attempts += 1
      return slice.pointee.attempts >= Self.attemptLimit
    }
    loop.counters.retries.wrappingAdd(UInt64(window.count), ordering: .relaxed)
    let error = lastError
    while let slice = exhausted.popFirst() {
      if canMove || slice.pointee.opcode == .read {
        giveUp(slice, error)
      } else {
        end(
          slice, .failed(error.code), reason: error.message + lateStoreNote(slice, after: "."))
      }
    }
  }
}

// MARK: - Writes that wait for a fence

extension TCPEndpoint {
  /// Sets aside the writes that must not be sent yet and ends those that must not be sent at all.
  func hold(_ slices: inout SliceQueue) {
    var free = SliceQueue()
    while let slice = slices.popFirst() {
      switch verdict(slice) {
      case .free: free.append(slice)
      case .pending:
        bound.include(slice)
        held.append(slice)
      case .overdue: end(slice, .failed(.unreachable), reason: describeOverdue(slice))
      }
    }
    slices = free
  }

  /// Queues what need not wait any longer.
  func reviewHeld() {
    if held.isEmpty { return }
    var waiting = held.takeAll()
    hold(&waiting)
    window.append(contentsOf: &waiting)
  }

  private func verdict(_ slice: SlicePointer) -> WriteGate.Verdict {
    if slice.pointee.opcode == .read || peer.gate.isEmpty { return .free }
    return peer.gate.verdict(slice.pointee.remote, slice.pointee.length, for: self)
  }

  /// Told with the end of a write that the target may store after it.
  func lateStoreNote(_ slice: SlicePointer, after stop: String) -> String {
    slice.pointee.wasSent && verdict(slice) != .free
      ? "\(stop) The peer may still store it: a later write there waits until it cannot."
      : ""
  }

  private func describeOverdue(_ slice: SlicePointer) -> String {
    let own =
      slice.pointee.wasSent ? "it was sent, not answered, and" : "an earlier write there"
    return "\(describe(slice)): \(own) may still be stored by the peer, which has not closed the "
      + "connection that carried it; writes to this memory fail until it does or restarts: "
      + "is its process stopped or its host cut off?"
  }

  func describe(_ slice: SlicePointer) -> String {
    "\(peer.description): \(slice.pointee.opcode) of \(slice.pointee.length) bytes at "
      + "0x\(String(slice.pointee.remote, radix: 16))"
  }
}

// MARK: - Deadlines, cancellation, retirement

extension TCPEndpoint {
  /// When the endpoint needs attention although nothing happens on its socket.
  var nextTimer: UInt64 {
    let deadline = bound.nanoseconds
    return switch connection.state {
    case .connecting(let until): min(until, deadline)
    case .resting(let until): window.isEmpty ? deadline : min(until, deadline)
    case .idle: window.isEmpty ? deadline : 0
    case .connected: deadline
    }
  }

  /// Does what `nextTimer` announced.
  func handleTimers(_ now: UInt64, sweeps: Bool) {
    loop.assertDriven()
    if case .connecting(let until) = connection.state, now >= until { connectFailed(.timedOut) }
    if sweeps || now >= bound.nanoseconds { sweep(now) }
    switch connection.state {
    case .idle, .resting: _ = progress()
    case .connecting, .connected: break
    }
  }

  /// Ends slices whose deadline has passed or whose batch is canceled, and hands over the rest of a
  /// retired peer.
  func sweep(_ now: UInt64) {
    loop.assertDriven()
    func isDue(_ slice: SlicePointer) -> Bool {
      slice.pointee.deadline <= now || slice.pointee.batch.isCancelRequested
    }
    let phase = describeProgress()
    let waited = held.removeAll(where: isDue)
    // First the connection ends: afterwards no byte arrives for what is ended below. A batch that
    // is canceled from here on keeps what is on the wire until the next sweep.
    if window.isAnyOnWire(isDue) {
      if window.isAnyOnWire({ $0.pointee.deadline <= now }) {
        peer.health.noteFailure("\(peer.description): no answer before a deadline")
      }
      disconnect(lastError, .unfenced, countsAttempt: false)
    }
    let sent = held.removeAll(where: isDue)
    let queued = window.removeAll(where: isDue)
    bound.reset(to: min(window.earliestDeadline, held.earliestDeadline))
    endDue(waited, "waiting for the end of an earlier write there, which was not answered")
    endDue(sent, phase)
    endDue(queued, phase)
    if peer.isRetired { retire() }
  }

  private func endDue(_ slices: consuming SliceQueue, _ phase: String) {
    var due = slices
    while let slice = due.popFirst() {
      if slice.pointee.batch.isCancelRequested {
        end(
          slice, .canceled,
          reason: "\(peer.description): canceled" + lateStoreNote(slice, after: "."))
      } else {
        end(
          slice, .timeout,
          reason: "\(describe(slice)): deadline passed while \(phase)"
            + (lastError.code == .system ? "." : ": is the peer alive and the timeout long enough?")
            + lateStoreNote(slice, after: ""))
      }
    }
  }

  private func describeProgress() -> String {
    switch connection.state {
    case .idle: return "waiting for a connection"
    case .connecting: return "connecting"
    case .resting: return "waiting to connect again after: \(lastError.message)"
    case .connected:
      if answer.offset > 0 { return "receiving the answer, \(answer.offset) bytes of it arrived" }
      if window.sentCount > 0 { return "waiting for the peer's answer" }
      return window.partialBytes > 0
        ? "sending, \(window.partialBytes) bytes are out" : "waiting to be sent"
    }
  }

  private func retire() {
    if !hasSlices { return closeSocket() }
    guard let successor = peer.successor else { return }
    if isConnected {
      disconnect(lastError, .unfenced, countsAttempt: false)
    } else {
      closeSocket()
    }
    connection.endRest()
    // What waits for a fence goes over once it is there, or ends here.
    var moved = window.takeAll()
    bound.reset(to: held.earliestDeadline)
    while let slice = moved.popFirst() {
      load.wrappingSubtract(slice.pointee.length, ordering: .relaxed)
      if slice.pointee.wasSent && successor.isRestarted {
        loop.count(slice, .failed(.unreachable))
        Batch.end(
          slice, .failed(.unreachable),
          reason: "\(peer.description): the peer restarted in mid-transfer; its buffers are new")
      } else {
        successor.resubmit(slice)
      }
    }
  }

  /// Ends everything; the loop is stopping.
  func shutDown() {
    takeInbox()
    closeSocket()
    let reason = "\(peer.description): engine destroyed"
    endAll(window.takeAll(), .canceled, reason)
    endAll(held.takeAll(), .canceled, reason)
  }
}
