import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// One data connection to a peer, made when it is needed and again when it broke.
///
/// Any thread queues slices through `push`; everything else belongs to whoever drives the loop. A
/// connection that breaks rewinds the window, since reads and writes may be repeated until they are
/// terminal.
package final class TCPEndpoint: @unchecked Sendable {
  // Unchecked: what any thread uses is atomic, the rest is confined as said above.
  let peer: TCPPeer
  // The transport's loops outlive its endpoints' use.
  package unowned(unsafe) let loop: TCPClientLoop

  // Any thread.
  private let inbox = SliceInbox()
  let readyLink = ReadyStack.Link()
  /// Bytes queued and not ended, for choosing the least busy connection.
  package let load = Atomic<Int>(0)
  /// Bytes of the slices that have completed on it; the driver counts.
  let movedBytes = Atomic<UInt64>(0)

  // The driver.
  var window: SendWindow
  var answer: ReceiveCursor
  var connection = TCPConnection()
  /// Writes that wait until nothing of an earlier one can land where they go.
  var held = SliceQueue()
  var bound = DeadlineBound()
  /// Why the last connection ended.
  var lastError = MooncakeError(.unreachable, "")
  /// Whether it is on the loop's list of endpoints with slices; the loop's.
  var isActive = false

  init(peer: TCPPeer, loop: TCPClientLoop) {
    self.peer = peer
    self.loop = loop
    window = SendWindow(isOneShot: peer.isOneShot)
    answer = ReceiveCursor(isOneShot: peer.isOneShot)
  }

  /// Queues slices from any thread; `loop.kick` or driving must follow.
  package func push(_ slices: consuming SliceQueue, byteCount: Int) {
    load.wrappingAdd(byteCount, ordering: .relaxed)
    inbox.push(slices)
    loop.schedule(self)
  }

  var isConnected: Bool { connection.isConnected }

  var hasSlices: Bool { !window.isEmpty || !held.isEmpty }

  /// Takes over what other threads queued.
  func takeInbox() {
    loop.assertDriven()
    var new = inbox.takeAll()
    if !new.isEmpty && !peer.gate.isEmpty { hold(&new) }
    var cursor = new.first
    while let slice = cursor {
      bound.include(slice)
      cursor = slice.pointee.next
    }
    window.append(contentsOf: &new)
  }

  @inline(__always)
  func end(_ slice: SlicePointer, _ outcome: Outcome, reason: @autoclosure () -> String = "") {
    let length = slice.pointee.length
    load.wrappingSubtract(length, ordering: .relaxed)
    if outcome == .completed {
      let moved = movedBytes.load(ordering: .relaxed)
      movedBytes.store(moved &+ UInt64(length), ordering: .relaxed)
    }
    loop.count(slice, outcome)
    Batch.end(slice, outcome, reason: reason())
  }

  /// Gives a slice back that nothing can land of any more, for another path.
  func giveUp(_ slice: SlicePointer, _ error: MooncakeError) {
    load.wrappingSubtract(slice.pointee.length, ordering: .relaxed)
    peer.link.giveUp(slice, on: peer.mark, error)
  }

  func endAll(_ slices: consuming SliceQueue, _ outcome: Outcome, _ reason: String) {
    var slices = slices
    while let slice = slices.popFirst() {
      end(slice, outcome, reason: reason + lateStoreNote(slice, after: "."))
    }
  }
}

// MARK: - Connecting

extension TCPEndpoint {
  /// Moves on whatever can be moved; returns whether anything was.
  func progress() -> Bool {
    loop.assertDriven()
    switch connection.state {
    case .idle:
      if window.isEmpty { return false }
      startConnect()
      return true
    case .resting(let until):
      if window.isEmpty || Clock.now() < until { return false }
      startConnect()
      return true
    case .connecting: return false
    case .connected:
      let sent = send()
      if !isConnected { return true }
      let received = receive()
      if received { sendBehindAnswers() }
      return received || sent
    }
  }

  /// Handles readiness that epoll reported.
  func handle(_ events: UInt32) {
    loop.assertDriven()
    if case .connecting = connection.state { return finishConnect() }
    if !isConnected { return }
    if events & Epoll.writable != 0 { _ = send() }
    if !isConnected { return }
    // Without requests in flight readability means that the peer closed or talks out of turn.
    if window.isEmpty { return closeIdle() }
    if events & ~Epoll.writable == 0 { return }
    _ = receive()
    sendBehindAnswers()
  }

  /// Answers make room for what waited for them; nothing else would send it.
  private func sendBehindAnswers() {
    if isConnected, !connection.isWatchedForRoom, window.maySend { _ = send() }
  }

  private func startConnect() {
    do throws(Errno) {
      try connection.start(to: peer.nextAddress(), for: self)
    } catch {
      connectFailed(error)
    }
  }

  private func finishConnect() {
    do throws(Errno) {
      if try !connection.finishConnecting(loop) { return }
    } catch {
      return connectFailed(error)
    }
    if peer.health.noteSuccess() {
      Log.info("\(peer.description): reached again", about: peer.description)
    }
    connection.watchForRoom(false, loop)
    _ = send()
  }

  func connectFailed(_ error: Errno) {
    loop.counters.clientConnectFailures.wrappingAdd(1, ordering: .relaxed)
    lastError = describeConnect(error)
    closeSocket()
    rest()
  }

  private func describeConnect(_ error: Errno) -> MooncakeError {
    let what = "\(peer.description): connect: \(error)"
    switch error {
    case .connectionRefused: return MooncakeError(.unreachable, "\(what): has the process ended?")
    case .tooManyOpenFiles, .tooManyOpenFilesInSystem: return MooncakeError(.system, what)
    default: return MooncakeError(.unreachable, what)
    }
  }

  /// Waits before the next connect; gives up on what is queued when the peer has failed too long.
  func rest() {
    let hasFailedTooLong = connection.rest()
    peer.health.noteFailure(lastError.message)
    peer.link.reportTrouble()
    let error = lastError
    if hasFailedTooLong {
      var queued = window.takeAll()
      while let slice = queued.popFirst() { giveUp(slice, error) }
      endAll(held.takeAll(), .failed(error.code), error.message)
      bound.reset()
    } else {
      moveAway(error)
    }
  }

  /// Hands what is queued to a path that works, if there is one.
  private func moveAway(_ error: MooncakeError) {
    if window.isEmpty { return }
    var queued = window.takeAll()
    let byteCount = queued.byteCount
    peer.link.moveAway(&queued, from: peer.mark, error)
    load.wrappingSubtract(byteCount - queued.byteCount, ordering: .relaxed)
    if queued.isEmpty { connection.forgetFailures() }
    window.append(contentsOf: &queued)
    bound.reset(to: min(window.earliestDeadline, held.earliestDeadline))
  }

  func closeSocket() { _ = takeSocket() }

  /// Takes the connection out of use; it is closed with the result.
  func takeSocket() -> Socket? {
    window.rewind()
    answer.rewind()
    return connection.takeSocket(loop)
  }

  private func closeIdle() {
    closeSocket()
    loop.counters.clientDisconnects.wrappingAdd(1, ordering: .relaxed)
  }

  /// A connection that rested is probed before it carries a request: the peer may have restarted.
  func probeIdle() {
    if isConnected, window.isEmpty, !peer.isOneShot, connection.isStale { closeIdle() }
  }
}

extension TCPEndpoint: WriteGateWaiter {
  package func gateChanged() {
    loop.schedule(self)
    loop.kick()
  }
}
