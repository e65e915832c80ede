import CLinux
import Glibc
import MooncakeSystem
import Synchronization

// What happens on a connected socket: gathered sends of requests, scattered receives of answers.
extension TCPEndpoint {
  /// Sends as much as the socket takes; returns whether anything was sent.
  func send() -> Bool {
    var isAny = false
    while maySend {
      let vectors = loop.vectors
      let count = gather(vectors)
      var message = msghdr()
      message.msg_iov = vectors
      message.msg_iovlen = count
      let sent = sendmsg(descriptor, &message, Int32(MSG_NOSIGNAL))
      if sent < 0 {
        let error = Errno.current
        if error == .interrupted { continue }
        if error == .wouldBlock {
          updateInterest(blocked: true)
          return isAny
        }
        if error.rawValue == EFAULT, !sendsAlone {
          sendsAlone = true
          continue
        }
        sendFailed(error)
        return true
      }
      isAny = true
      loop.burstBytes &+= sent
      advanceSend(sent)
      // Answers come back while a long list is sent: give them a turn.
      if sent >= TCPWire.sendChunkBytes / 2, receiveIsDue { break }
    }
    // Armed only for what could go out at once: a writable socket would keep the driver awake.
    updateInterest(blocked: maySend)
    return isAny
  }

  /// Whether there is something to send that need not wait for answers first.
  var maySend: Bool {
    guard let next = sendSlice, let first = queue.first else { return false }
    if sentCount == 0 { return true }
    // Version 1 has no acknowledgment: one request a connection, ended by the peer's close.
    if peer.isOneShot || sentCount >= Self.inflightLimit { return false }
    // A reset may have swallowed the refusal of one of several requests: suspects go alone.
    return !isSuspect(first) && !isSuspect(next)
  }

  private var receiveIsDue: Bool { sentCount > 0 }

  func updateInterest(blocked: Bool) {
    if wantsWritable == blocked { return }
    wantsWritable = blocked
    loop.rewatch(
      descriptor, events: Epoll.readable | (blocked ? Epoll.writable : 0), token: token)
  }

  /// Fills vectors with what is to be sent next, one chunk at most.
  private func gather(_ vectors: UnsafeMutablePointer<iovec>) -> Int {
    var count = 0
    var room = TCPWire.sendChunkBytes
    var skip = sendOffset
    var headerIndex = 0
    var cursor = sendSlice
    var slicesLeft = peer.isOneShot || sendsAlone ? 1 : Self.inflightLimit - sentCount
    while let slice = cursor, count + 2 <= TCPWire.vectorLimit, room > 0, slicesLeft > 0 {
      if skip < TCPWire.headerBytes {
        let header = loop.headers + headerIndex * TCPWire.headerBytes
        TCPWire.Header(
          size: UInt64(slice.pointee.length), address: slice.pointee.remote,
          opcode: slice.pointee.opcode, isAcknowledged: isAcknowledged
        ).write(to: header)
        headerIndex += 1
        vectors[count] = iovec(iov_base: header + skip, iov_len: TCPWire.headerBytes - skip)
        count += 1
        skip = TCPWire.headerBytes
      }
      if slice.pointee.opcode == .write {
        let done = skip - TCPWire.headerBytes
        let length = min(slice.pointee.length - done, room)
        vectors[count] = iovec(iov_base: slice.pointee.local + done, iov_len: length)
        count += 1
        room -= length
      }
      skip = 0
      cursor = slice.pointee.next
      slicesLeft -= 1
      if isSuspect(slice) || cursor.map(isSuspect) == true { break }
    }
    return count
  }

  private func isSuspect(_ slice: SlicePointer) -> Bool {
    slice.pointee.attempts >= Self.suspectAttempts
  }

  private func advanceSend(_ byteCount: Int) {
    var left = byteCount
    while left > 0, let slice = sendSlice {
      let total = TCPWire.headerBytes + (slice.pointee.opcode == .write ? slice.pointee.length : 0)
      let due = total - sendOffset
      if left < due {
        sendOffset += left
        return
      }
      left -= due
      sendOffset = 0
      sendsAlone = false
      sentCount += 1
      sendSlice = slice.pointee.next
      // The half-close makes a version 1 server close once it has stored the data: its only
      // receipt.
      if peer.isOneShot && slice.pointee.opcode == .write {
        _ = shutdown(descriptor, Int32(SHUT_WR))
      }
    }
  }

  private func sendFailed(_ error: Errno) {
    if error.rawValue == EFAULT, let slice = sendSlice {
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
      guard case .connected = state else { return }
    }
    disconnect(
      EngineError(.unreachable, "\(peer.description): sending requests: \(error)"), ending)
  }

  /// Fails one slice that is on the wire; the connection cannot be used past it.
  private func failSlice(_ slice: SlicePointer, _ outcome: Outcome, _ reason: String) {
    disconnect(EngineError(.unreachable, reason), .open, blames: false)
    // The end of a write that was sent in part waits for nothing: only later ones there do.
    endAll(queue.removeAll { $0 == slice }, outcome, reason)
    endAll(held.removeAll { $0 == slice }, outcome, reason)
    sendSlice = queue.first
    if !hasSlices { earliestDeadline = .max }
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
    // Bounded, so that one fast peer leaves the loop to the others.
    for _ in 0..<16 {
      if sentCount == 0 && !(sendOffset > 0 && sendSlice != nil) { break }
      let (vectorCount, expected) = scatter(loop.vectors)
      let count = readv(descriptor, loop.vectors, Int32(vectorCount))
      if count < 0 {
        let error = Errno.current
        if error == .interrupted { continue }
        if error == .wouldBlock { break }
        if error.rawValue == EFAULT, !receivesAlone {
          receivesAlone = true
          continue
        }
        receiveFailed(error)
        return true
      }
      if count == 0 {
        endOfStream()
        return true
      }
      isAny = true
      loop.burstBytes &+= count
      advanceReceive(count)
      guard case .connected = state else { return true }
      if count < expected { break }
    }
    if receiveOffset > TCPWire.statusBytes && isAny { peer.countPartialArrival() }
    if queue.isEmpty {
      lastUse = Clock.now()
      if held.isEmpty { earliestDeadline = .max }
    }
    return isAny
  }

  /// Lays out where the next bytes of the stream belong.
  private func scatter(_ vectors: UnsafeMutablePointer<iovec>) -> (count: Int, byteCount: Int) {
    var count = 0
    var total = 0
    var skip = receiveOffset
    var statusIndex = 0
    var cursor = queue.first
    var left = receivesAlone ? 1 : sentCount + (sendOffset > 0 ? 1 : 0)
    let frameBytes = isAcknowledged ? TCPWire.statusBytes : 0
    while let slice = cursor, left > 0, count + 2 <= TCPWire.vectorLimit {
      if skip < frameBytes {
        let status = loop.statuses + statusIndex * TCPWire.statusBytes
        if skip > 0 { status.storeBytes(of: partialStatus, as: UInt64.self) }
        vectors[count] = iovec(iov_base: status + skip, iov_len: frameBytes - skip)
        count += 1
        total += frameBytes - skip
        skip = frameBytes
      }
      statusIndex += 1
      if slice.pointee.opcode == .read {
        let done = skip - frameBytes
        let length = slice.pointee.length - done
        vectors[count] = iovec(iov_base: slice.pointee.local + done, iov_len: length)
        count += 1
        total += length
        if total >= TCPClientLoop.receiveLimitBytes { break }
      }
      skip = 0
      cursor = slice.pointee.next
      left -= 1
    }
    if count == 0 {
      // Version 1 write: only the end of the stream is expected.
      vectors[0] = iovec(iov_base: loop.statuses, iov_len: 1)
      return (1, 1)
    }
    return (count, total)
  }

  private func advanceReceive(_ byteCount: Int) {
    var left = byteCount
    var statusIndex = 0
    let frameBytes = isAcknowledged ? TCPWire.statusBytes : 0
    while left > 0, let slice = queue.first {
      if receiveOffset < frameBytes {
        let part = min(left, frameBytes - receiveOffset)
        receiveOffset += part
        left -= part
        if receiveOffset < frameBytes {
          // Kept in the endpoint until the rest arrives: the loop's slots are shared.
          keepPartialStatus(loop.statuses + statusIndex * TCPWire.statusBytes)
          return
        }
        let status = TCPWire.Status(loop.statuses + statusIndex * TCPWire.statusBytes)
        if status != .ok { return refused(slice, status) }
      }
      statusIndex += 1
      let payload = slice.pointee.opcode == .read ? slice.pointee.length : 0
      if !isAcknowledged && payload == 0 { return talksOutOfTurn() }
      let part = min(left, frameBytes + payload - receiveOffset)
      receiveOffset += part
      left -= part
      if receiveOffset < frameBytes + payload { return }
      if sendSlice == slice { return talksOutOfTurn() }
      receiveOffset = 0
      receivesAlone = false
      endFirst(.completed)
      if peer.isOneShot { return finishOneShot() }
    }
  }

  private func keepPartialStatus(_ status: UnsafeMutableRawPointer) {
    partialStatus = status.loadUnaligned(as: UInt64.self)
  }

  private func refused(_ slice: SlicePointer, _ status: TCPWire.Status) {
    let what =
      "\(peer.description): \(slice.pointee.opcode) of \(slice.pointee.length) bytes at "
      + "0x\(String(slice.pointee.remote, radix: 16))"
    switch status {
    case .rejected:
      // The peer reads no further request and has answered those before.
      disconnect(
        EngineError(.notRegistered, "\(what): the peer refused the address"), .fenced,
        blames: false)
      let refused = queue.removeAll { $0 == slice }
      sendSlice = queue.first
      load.wrappingSubtract(slice.pointee.length, ordering: .relaxed)
      if !refused.isEmpty { peer.reportRefusal(slice) }
    case .failed(let code):
      failSlice(slice, .failed(.protocolViolation), "\(what): the peer failed with code \(code)")
    case .malformed, .ok:
      disconnect(
        EngineError(
          .protocolViolation,
          "\(what): the answer is no status frame: the peer speaks another protocol"), .open)
      peer.reportTrouble()
    }
  }

  private func talksOutOfTurn() {
    disconnect(
      EngineError(
        .protocolViolation, "\(peer.description): the peer sent bytes that nobody asked for"),
      .open)
  }

  private func receiveFailed(_ error: Errno) {
    if error.rawValue == EFAULT, let slice = queue.first {
      let reason =
        "\(peer.description): read of \(slice.pointee.length) bytes: "
        + "the destination memory is not writable"
      return failSlice(slice, .failed(.invalidArgument), reason)
    }
    disconnect(
      EngineError(.unreachable, "\(peer.description): waiting for an answer: \(error)"),
      ending(error))
  }

  private func endOfStream() {
    if peer.isOneShot, let slice = queue.first, slice.pointee.opcode == .write, sentCount > 0,
      hasPeerReadEverything
    {
      endFirst(.completed)
      return finishOneShot()
    }
    let progress = receiveOffset > 0 ? " after \(receiveOffset) bytes of an answer" : ""
    disconnect(
      EngineError(.unreachable, "\(peer.description): the peer closed the connection\(progress)"),
      .fenced)
  }

  /// Whether the peer's kernel has acknowledged all data that was sent. A peer that closes with
  /// some of it unread resets the connection, and what comes after a close is never acknowledged:
  /// so before an orderly end of the stream this means that the peer has read it. The end of this
  /// side's stream counts as a byte.
  private var hasPeerReadEverything: Bool {
    var unacknowledged: Int32 = 0
    return ioctl(descriptor, UInt(TIOCOUTQ), &unacknowledged) == 0 && unacknowledged <= 1
  }

  /// Version 1 servers up to 0.3.9 close after each request, so every request gets a connection.
  private func finishOneShot() {
    closeSocket()
    if !hasSlices { earliestDeadline = .max }
  }
}
