import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

// What happens on a connected socket: gathered sends of requests, scattered receives of answers.
extension TCPEndpoint {
  /// System calls of one `receive`, so that one fast peer leaves the loop to the others.
  private static let receiveCallLimit = 16

  /// Sends as much as the socket takes; returns whether anything was sent.
  func send() -> Bool {
    var isAny = false
    while window.maySend {
      let vectors = loop.vectors
      let count = window.gather(into: vectors, headers: loop.headers)
      var message = msghdr()
      message.msg_iov = vectors
      message.msg_iovlen = count
      let sent = sendmsg(connection.descriptor, &message, Int32(MSG_NOSIGNAL))
      if sent < 0 {
        let error = Errno.current
        if error == .interrupted { continue }
        if error == .wouldBlock {
          connection.watchForRoom(true, loop)
          return isAny
        }
        if error.rawValue == EFAULT, window.sendAlone() { continue }
        sendFailed(error)
        return true
      }
      isAny = true
      loop.noteMoved(sent)
      window.advance(sent)
      if peer.isOneShot { endOneShotStream() }
      // Answers come back while a long list is sent: receive them in between.
      if sent >= TCPWire.sendChunkBytes / 2, window.sentCount > 0 { break }
    }
    // Armed only for what could go out at once: a writable socket would keep the driver awake.
    connection.watchForRoom(window.maySend, loop)
    return isAny
  }

  /// The half-close makes a version 1 server close once it has stored the data of a write: its only
  /// receipt.
  private func endOneShotStream() {
    if window.sentCount > 0, window.first?.pointee.opcode == .write { connection.shutdownWrite() }
  }

  private func sendFailed(_ error: Errno) {
    if error.rawValue == EFAULT, let slice = window.unsent {
      let reason =
        "\(peer.description): write of \(slice.pointee.length) bytes: "
        + "the source memory is not readable"
      return failSlice(slice, .failed(.invalidArgument), reason)
    }
    let ending = ending(error)
    if case .fenced = ending {
      // A refusal may have arrived before the reset: it tells more than the broken pipe. After
      // another error the socket would show an end of the stream that no peer has sent.
      _ = receive()
      if !isConnected { return }
    }
    disconnect(
      MooncakeError(.unreachable, "\(peer.description): sending requests: \(error)"), ending)
  }

  /// Fails one slice that is on the wire; the connection cannot be used past it.
  private func failSlice(_ slice: SlicePointer, _ outcome: Outcome, _ reason: String) {
    disconnect(MooncakeError(.unreachable, reason), .unfenced, countsAttempt: false)
    // The end of a write that was sent in part waits for nothing: only later ones there do.
    endAll(window.removeAll { $0 == slice }, outcome, reason)
    endAll(held.removeAll { $0 == slice }, outcome, reason)
    if !hasSlices { bound.reset() }
  }

  /// A reset was sent by a peer that has closed the connection. All other errors are this side's
  /// opinion.
  private func ending(_ error: Errno) -> Ending {
    error.rawValue == ECONNRESET || error.rawValue == EPIPE ? .fenced : .lost
  }
}

// MARK: - Receiving

extension TCPEndpoint {
  /// Receives what has arrived; returns whether anything had.
  func receive() -> Bool {
    var isAny = false
    for _ in 0..<Self.receiveCallLimit {
      if window.onWireCount == 0 { break }
      let (vectorCount, expected) = answer.scatter(
        window, into: loop.vectors, statuses: loop.statuses)
      let count = readv(connection.descriptor, loop.vectors, Int32(vectorCount))
      if count < 0 {
        let error = Errno.current
        if error == .interrupted { continue }
        if error == .wouldBlock { break }
        if error.rawValue == EFAULT, answer.receiveAlone() { continue }
        receiveFailed(error)
        return true
      }
      if count == 0 {
        endOfStream()
        return true
      }
      isAny = true
      loop.noteMoved(count)
      advanceReceive(count)
      if !isConnected { return true }
      if count < expected { break }
    }
    // Another connection to the peer may have failed meanwhile; this one works.
    if isAny { peer.health.noteSuccess() }
    if isAny && answer.hasData { peer.countPartialArrival() }
    if window.isEmpty {
      connection.noteUse()
      if held.isEmpty { bound.reset() }
    }
    return isAny
  }

  @inline(__always)
  private func advanceReceive(_ byteCount: Int) {
    var left = byteCount
    var status = loop.statuses
    while left > 0, let slice = window.first {
      switch answer.advance(&left, slice, status: status) {
      case .incomplete: return
      case .failed(let status): return refused(slice, status)
      case .unexpected: return receivedUnexpected()
      case .complete: break
      }
      if window.sentCount == 0 { return receivedUnexpected() }
      endAnswered()
      if peer.isOneShot { return finishOneShot() }
      status += TCPWire.statusBytes
    }
  }

  /// Ends the first slice, whose answer is complete.
  @inline(__always)
  private func endAnswered() {
    if let slice = window.popAnswered() { end(slice, .completed) }
  }

  private func refused(_ slice: SlicePointer, _ status: TCPWire.Status) {
    let what = describe(slice)
    switch status {
    case .rejected:
      // The peer reads no further request and has answered those before.
      disconnect(
        MooncakeError(.notRegistered, "\(what): the peer refused the address"), .fenced,
        countsAttempt: false)
      var refused = window.removeAll { $0 == slice }
      load.wrappingSubtract(slice.pointee.length, ordering: .relaxed)
      if let slice = refused.popFirst() { peer.link.refused(slice) }
    case .failed(let code):
      failSlice(slice, .failed(.protocolViolation), "\(what): the peer failed with code \(code)")
    case .malformed, .ok:
      disconnect(
        MooncakeError(
          .protocolViolation,
          "\(what): the answer is no status frame: the peer speaks another protocol"), .unfenced)
      peer.link.reportTrouble()
    }
  }

  private func receivedUnexpected() {
    disconnect(
      MooncakeError(
        .protocolViolation, "\(peer.description): the peer sent bytes that nobody asked for"),
      .unfenced)
  }

  private func receiveFailed(_ error: Errno) {
    if error.rawValue == EFAULT, let slice = window.first {
      let reason =
        "\(peer.description): read of \(slice.pointee.length) bytes: "
        + "the destination memory is not writable"
      return failSlice(slice, .failed(.invalidArgument), reason)
    }
    disconnect(
      MooncakeError(.unreachable, "\(peer.description): waiting for an answer: \(error)"),
      ending(error))
  }

  private func endOfStream() {
    if peer.isOneShot, window.sentCount > 0, window.first?.pointee.opcode == .write,
      connection.hasPeerReadEverything
    {
      endAnswered()
      return finishOneShot()
    }
    let progress = answer.offset > 0 ? " after \(answer.offset) bytes of an answer" : ""
    disconnect(
      MooncakeError(.unreachable, "\(peer.description): the peer closed the connection\(progress)"),
      .fenced)
  }

  /// Version 1 servers up to 0.3.9 close after each request, so every request gets a connection.
  private func finishOneShot() {
    closeSocket()
    if !hasSlices { bound.reset() }
  }
}
