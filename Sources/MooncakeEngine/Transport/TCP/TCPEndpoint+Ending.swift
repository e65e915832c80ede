import MooncakeBase
import MooncakeSystem
import Synchronization

// How connections end, and what becomes of the slices on them.
extension TCPEndpoint {
  enum Ending {
    /// The peer has closed it, or said that it stores nothing more of it.
    case fenced
    /// On this side only: the peer may still be storing.
    case open
    /// The kernel has given it up, and with it the way to learn what the peer still stores.
    case lost
  }

  /// Takes the connection out of use and decides what becomes of its slices. Reads may be sent
  /// again at once, for nothing of the connection reaches local memory any more. Writes wait until
  /// nothing of them can land at the target.
  func disconnect(_ error: EngineError, _ ending: Ending, blames: Bool = true) {
    loop.counters.clientDisconnects.wrappingAdd(1, ordering: .relaxed)
    lastError = error
    let sent = onWireCount
    let unanswered = ending == .fenced ? [] : unansweredWrites()
    if unanswered.isEmpty {
      closeSocket()
    } else if ending == .open, let socket = takeSocket() {
      loop.fence(socket, peer, unanswered: unanswered)
    } else {
      closeSocket()
      _ = peer.unfenced.add(unanswered, isOverdue: true)
    }
    if blames { blame(sent) }
    if !unanswered.isEmpty { hold(&queue) }
    sendSlice = queue.first
    if blames { rest() }
  }

  /// Slices on the wire may be tried again, but not forever.
  private func blame(_ count: Int) {
    var left = count
    var exhausted = queue.removeAll { slice in
      defer { left -= 1 }
      guard left > 0 else { return false }
      slice.pointee.attempts += 1
      return slice.pointee.attempts >= Self.attemptLimit
    }
    loop.counters.retries.wrappingAdd(UInt64(queue.count), ordering: .relaxed)
    let error = lastError
    while let slice = exhausted.popFirst() {
      end(
        slice, .failed(error.code), reason: error.message + lateStoreNote(slice, after: "."))
    }
  }

  /// Where what is on the wire and not answered is written.
  private func unansweredWrites() -> [Range<UInt64>] {
    var ranges: [Range<UInt64>] = []
    var cursor = queue.first
    var left = onWireCount
    while let slice = cursor, left > 0 {
      if slice.pointee.opcode == .write {
        let start = slice.pointee.remote
        let end = start &+ UInt64(slice.pointee.length)
        if let last = ranges.last, last.upperBound == start {
          ranges[ranges.count - 1] = last.lowerBound..<end
        } else {
          ranges.append(start..<end)
        }
      }
      cursor = slice.pointee.next
      left -= 1
    }
    return ranges
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
        let isCanceled = slice.pointee.batch.isCancelRequested
        earliestDeadline = isCanceled ? 0 : min(earliestDeadline, slice.pointee.deadline)
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
    if sendSlice == nil { sendSlice = waiting.first }
    queue.append(contentsOf: &waiting)
  }

  private func verdict(_ slice: SlicePointer) -> UnfencedRanges.Verdict {
    if slice.pointee.opcode == .read || peer.unfenced.isEmpty { return .free }
    return peer.unfenced.verdict(slice.pointee.remote, slice.pointee.length, for: self)
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

  private func describe(_ slice: SlicePointer) -> String {
    "\(peer.description): \(slice.pointee.opcode) of \(slice.pointee.length) bytes at "
      + "0x\(String(slice.pointee.remote, radix: 16))"
  }
}

// MARK: - Deadlines, cancellation, retirement

extension TCPEndpoint {
  /// When the endpoint needs attention although nothing happens on its socket.
  var nextTimer: UInt64 {
    switch state {
    case .connecting(let until): min(until, earliestDeadline)
    case .resting(let until): queue.isEmpty ? earliestDeadline : min(until, earliestDeadline)
    case .idle: queue.isEmpty ? earliestDeadline : 0
    case .connected: earliestDeadline
    }
  }

  /// Does what `nextTimer` announced.
  func attend(_ now: UInt64, sweeps: Bool) {
    if case .connecting(let until) = state, now >= until { connectFailed(.timedOut) }
    if sweeps || now >= earliestDeadline { sweep(now) }
    switch state {
    case .idle, .resting: _ = progress()
    case .connecting, .connected: break
    }
  }

  /// Ends slices whose deadline has passed or whose batch is canceled, and hands over the rest of a
  /// retired peer.
  func sweep(_ now: UInt64) {
    func isDue(_ slice: SlicePointer) -> Bool {
      slice.pointee.deadline <= now || slice.pointee.batch.isCancelRequested
    }
    let phase = describeProgress()
    let waited = held.removeAll(where: isDue)
    let breaksConnection = isAnyOnWire(isDue)
    // Only then does the connection end: afterwards no byte arrives for what is ended below.
    if breaksConnection { disconnect(lastError, .open, blames: false) }
    let sent = held.removeAll(where: isDue)
    let queued = queue.removeAll(where: isDue)
    sendSlice = breaksConnection ? queue.first : firstUnsent
    earliestDeadline = min(queue.earliestDeadline, held.earliestDeadline)
    endDue(waited, "waiting for the end of an earlier write there, which was not answered")
    endDue(sent, phase)
    endDue(queued, phase)
    if peer.isRetired { retire() }
  }

  private func isAnyOnWire(_ isWanted: (SlicePointer) -> Bool) -> Bool {
    var cursor = queue.first
    var left = onWireCount
    while let slice = cursor, left > 0 {
      if isWanted(slice) { return true }
      cursor = slice.pointee.next
      left -= 1
    }
    return false
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

  /// The list below the sent bound is unchanged when nothing there was due.
  private var firstUnsent: SlicePointer? {
    var cursor = queue.first
    var index = 0
    while let slice = cursor, index < sentCount {
      cursor = slice.pointee.next
      index += 1
    }
    return cursor
  }

  private func describeProgress() -> String {
    switch state {
    case .idle: return "waiting for a connection"
    case .connecting: return "connecting"
    case .resting: return "waiting to connect again after: \(lastError.message)"
    case .connected:
      if receiveOffset > 0 { return "receiving the answer, \(receiveOffset) bytes of it arrived" }
      if sentCount > 0 { return "waiting for the peer's answer" }
      return sendOffset > 0 ? "sending, \(sendOffset) bytes are out" : "waiting to be sent"
    }
  }

  private func retire() {
    if !hasSlices { return closeSocket() }
    guard let successor = peer.successor else { return }
    if case .connected = state {
      disconnect(lastError, .open, blames: false)
    } else {
      closeSocket()
    }
    state = .idle
    // What waits for a fence goes over once it is there, or ends here.
    var moved = queue.takeAll()
    rewind()
    earliestDeadline = held.earliestDeadline
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
    endAll(queue.takeAll(), .canceled, reason)
    endAll(held.takeAll(), .canceled, reason)
  }
}
