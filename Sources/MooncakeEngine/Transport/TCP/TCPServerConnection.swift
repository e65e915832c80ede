import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// One accepted connection: parses requests, stores written data, answers in order. Confined to the
/// thread of its loop.
final class TCPServerConnection {
  /// An answer that waits to be sent.
  private struct Reply {
    var address: UInt64
    var length: Int
    var status: StatusFrame
    var totalBytes: Int { length + (status == .none ? 0 : TCPWire.statusBytes) }
  }

  private enum StatusFrame { case none, ok, rejected }

  private enum Phase {
    case open
    /// The peer has finished sending: answer what it asked, then close.
    case ending
    /// A refusal is queued: send what is due, then tell the end.
    case refusing
    /// A version 1 refusal: it knows no status, and an orderly end would pass for success.
    case resetting
    /// Discards what the peer still sends, so that a reset does not overtake the refusal.
    case draining(until: UInt64, byteCount: Int)
  }

  /// What the loop does next with the connection.
  enum Next { case keep, again, close }

  let socket: Socket
  let peer: String
  private(set) var interest: UInt32 = Epoll.readable
  private var phase = Phase.open

  private let partialHeader = UnsafeMutableRawPointer.allocate(
    byteCount: TCPWire.headerBytes, alignment: 8)
  private var partialCount = 0
  private var writeAddress: UInt64 = 0
  private var writeRemaining = 0
  private var writeIsAcknowledged = false
  /// After a large write the next header is read alone, so that its data goes straight to its
  /// place.
  private var expectsBulk = false

  private var replies: [Reply] = []
  private var replyIndex = 0
  /// Bytes of the first waiting reply that are sent.
  private var replyOffset = 0
  private var isBlocked = false

  private static let replyLimit = 1024
  /// From here on a system call for each write costs less than a second copy.
  private static let bulkBytes = 16 << 10
  private static let turnBytes = 4 << 20
  private static let drainBytes = 256 << 20
  private static let drainNanoseconds: UInt64 = 2_000_000_000

  init(socket: consuming Socket, peer: String) {
    self.socket = socket
    self.peer = peer
  }

  deinit { partialHeader.deallocate() }

  /// Whether a request of the connection touches one of the ranges.
  func touches(_ ranges: [RemoteBuffer]) -> Bool {
    func hit(_ address: UInt64, _ length: Int) -> Bool {
      ranges.contains {
        $0.address < address &+ UInt64(length) && address < $0.address &+ $0.length
      }
    }
    if writeRemaining > 0 && hit(writeAddress, writeRemaining) { return true }
    return replies[replyIndex...].contains { $0.length > 0 && hit($0.address, $0.length) }
  }

  /// When a draining connection is closed at the latest; nil for others.
  var drainDeadline: UInt64? {
    if case .draining(let until, _) = phase { return until }
    return nil
  }

  /// Serves what the socket has and takes.
  func serve(_ loop: TCPServerLoop) -> Next {
    if case .draining = phase { return drain(loop) }
    var next = Next.keep
    if replies.count - replyIndex < Self.replyLimit, case .open = phase {
      next = receive(loop)
      if case .close = next { return .close }
    }
    if case .close = flush(loop) { return .close }
    if case .resetting = phase {
      socket.resetOnClose()
      return .close
    }
    if case .ending = phase, replyIndex == replies.count { return .close }
    if case .refusing = phase, replyIndex == replies.count {
      socket.shutdownWrite()
      phase = .draining(until: Clock.now() + Self.drainNanoseconds, byteCount: 0)
      next = .again
    }
    updateInterest()
    return isBlocked ? .keep : next
  }

  private func updateInterest() {
    var wanted: UInt32 = isBlocked ? Epoll.writable : 0
    let acceptsRequests = replies.count - replyIndex < Self.replyLimit
    switch phase {
    case .open: if acceptsRequests { wanted |= Epoll.readable }
    case .ending, .refusing, .resetting: break
    case .draining: wanted |= Epoll.readable
    }
    interest = wanted
  }
}

// MARK: - Receiving

extension TCPServerConnection {
  private func receive(_ loop: TCPServerLoop) -> Next {
    var budget = Self.turnBytes
    while budget > 0 {
      let count = writeRemaining > 0 ? receiveIntoPlace(loop) : receiveRequests(loop)
      if count == -Int(EAGAIN) { return .keep }
      if count < 0 { return .close }
      if count == 0 {
        phase = .ending
        return .keep
      }
      budget -= count
      if replies.count - replyIndex >= Self.replyLimit { return .again }
      guard case .open = phase else { return .keep }
    }
    return .again
  }

  /// Receives write data where it belongs, and what follows it as `receiveRequests` does. Returns
  /// the number of bytes, 0 at the end, or a negative error number.
  private func receiveIntoPlace(_ loop: TCPServerLoop) -> Int {
    let vectors = loop.vectors
    vectors[0] = iovec(
      iov_base: UnsafeMutableRawPointer(bitPattern: UInt(writeAddress)), iov_len: writeRemaining)
    vectors[1] = iovec(iov_base: loop.input.address, iov_len: requestLimit)
    let count = readv(socket.rawValue, vectors, 2)
    if count <= 0 { return count == 0 ? 0 : failure(loop, "storing written data") }
    loop.countReceived(count)
    if expectsBulk { loop.noteBulk() }
    if count < writeRemaining {
      writeAddress += UInt64(count)
      writeRemaining -= count
      return count
    }
    let rest = count - writeRemaining
    writeRemaining = 0
    finishWrite(loop)
    return take(rest, loop) ? count : -Int(EFAULT)
  }

  /// Receives headers, with the data of small writes behind them.
  private func receiveRequests(_ loop: TCPServerLoop) -> Int {
    let input = loop.input.address
    input.copyMemory(from: partialHeader, byteCount: partialCount)
    let count = recv(
      socket.rawValue, input + partialCount, requestLimit - partialCount, 0)
    if count <= 0 { return count == 0 ? 0 : failure(loop, "receiving requests") }
    loop.countReceived(count)
    return take(partialCount + count, loop) ? count : -Int(EFAULT)
  }

  private var requestLimit: Int {
    expectsBulk ? TCPWire.headerBytes : ScatterBuffer.byteCount
  }

  /// Obeys what the input holds; false if the memory it is for does not take it.
  private func take(_ total: Int, _ loop: TCPServerLoop) -> Bool {
    partialCount = 0
    do throws(Errno) {
      try parse(total, loop)
      try loop.input.flush()
      return true
    } catch {
      Log.warning(
        "tcp peer \(peer): storing written data: \(error): registered memory is not writable",
        about: Log.host(of: peer))
      return false
    }
  }

  private func parse(_ total: Int, _ loop: TCPServerLoop) throws(Errno) {
    let input = loop.input.address
    var offset = 0
    while total - offset >= TCPWire.headerBytes {
      let header = TCPWire.Header(input + offset)
      offset += TCPWire.headerBytes
      guard admit(header, loop) else { return }
      guard header.opcode == .write else { continue }
      begin(header)
      let present = min(writeRemaining, total - offset)
      if present > 0 {
        let target = UnsafeMutableRawPointer(bitPattern: UInt(writeAddress))!
        try loop.input.add(offset: offset, count: present, target: target)
        offset += present
        writeAddress += UInt64(present)
        writeRemaining -= present
      }
      if writeRemaining > 0 { return }
      finishWrite(loop)
    }
    partialCount = total - offset
    partialHeader.copyMemory(from: input + offset, byteCount: partialCount)
  }

  /// Checks a request; queues the answer of a read or the refusal.
  private func admit(_ header: TCPWire.Header, _ loop: TCPServerLoop) -> Bool {
    expectsBulk = header.opcode == .write && header.size >= UInt64(Self.bulkBytes)
    let verdict = loop.check(header)
    if verdict == .allowed {
      if header.opcode == .read {
        replies.append(
          Reply(
            address: header.address, length: Int(header.size),
            status: header.isAcknowledged ? .ok : .none))
        loop.countRequest()
      }
      return true
    }
    loop.countRejection(header, verdict, peer)
    if header.isAcknowledged {
      phase = .refusing
      replies.append(Reply(address: 0, length: 0, status: .rejected))
    } else {
      phase = .resetting
    }
    return false
  }

  private func begin(_ header: TCPWire.Header) {
    writeAddress = header.address
    writeRemaining = Int(header.size)
    writeIsAcknowledged = header.isAcknowledged
  }

  private func finishWrite(_ loop: TCPServerLoop) {
    loop.countRequest()
    if writeIsAcknowledged { replies.append(Reply(address: 0, length: 0, status: .ok)) }
  }

  private func drain(_ loop: TCPServerLoop) -> Next {
    guard case .draining(let until, var byteCount) = phase else { return .close }
    while byteCount < Self.drainBytes && Clock.now() < until {
      let count = recv(socket.rawValue, loop.input.address, ScatterBuffer.byteCount, 0)
      if count == 0 { return .close }
      if count < 0 {
        phase = .draining(until: until, byteCount: byteCount)
        updateInterest()
        return errno == EAGAIN || errno == EINTR ? .keep : .close
      }
      byteCount += count
    }
    return .close
  }

  private func failure(_ loop: TCPServerLoop, _ action: String) -> Int {
    let error = Errno.current
    if error == .wouldBlock || error == .interrupted { return -Int(EAGAIN) }
    if error.rawValue == EFAULT {
      Log.warning(
        "tcp peer \(peer): \(action): registered memory is not mapped or not writable",
        about: Log.host(of: peer))
    } else {
      Log.debug("tcp peer \(peer): \(action): \(error)", about: Log.host(of: peer))
    }
    return -Int(error.rawValue)
  }
}

// MARK: - Sending

extension TCPServerConnection {
  private func flush(_ loop: TCPServerLoop) -> Next {
    var budget = Self.turnBytes
    isBlocked = false
    while replyIndex < replies.count {
      if budget <= 0 {
        // Others have their turn; the socket is writable, so the loop comes back at once.
        isBlocked = true
        return .keep
      }
      var message = msghdr()
      message.msg_iov = loop.vectors
      message.msg_iovlen = gather(into: loop.vectors)
      let count = sendmsg(socket.rawValue, &message, Int32(MSG_NOSIGNAL))
      if count < 0 {
        let error = Errno.current
        if error == .interrupted { continue }
        if error == .wouldBlock {
          isBlocked = true
          return .keep
        }
        _ = failure(loop, "sending read data")
        return .close
      }
      loop.countSent(count)
      budget -= count
      if replies[replyIndex].length >= Self.bulkBytes { loop.noteBulk() }
      consume(count)
      forgetSent()
    }
    return .keep
  }

  /// Forgets what was sent, also where a peer always leaves something unsent. What moves is never
  /// more than what goes.
  private func forgetSent() {
    if replyIndex == replies.count {
      replies.removeAll(keepingCapacity: replies.capacity <= 4 * Self.replyLimit)
    } else if replyIndex >= max(Self.replyLimit, replies.count / 2) {
      replies.removeFirst(replyIndex)
    } else {
      return
    }
    replyIndex = 0
  }

  /// Fills vectors with what is due next, one chunk at most; returns their number.
  private func gather(into vectors: UnsafeMutablePointer<iovec>) -> Int {
    var count = 0
    var room = TCPWire.sendChunkBytes
    var skip = replyOffset
    var index = replyIndex
    while index < replies.count, count + 2 <= TCPWire.vectorCount, room > 0 {
      let reply = replies[index]
      if reply.status != .none {
        if skip < TCPWire.statusBytes {
          let frame = reply.status == .ok ? TCPServerLoop.okFrame : TCPServerLoop.rejectedFrame
          vectors[count] = iovec(
            iov_base: UnsafeMutableRawPointer(mutating: frame + skip),
            iov_len: TCPWire.statusBytes - skip)
          count += 1
          skip = 0
        } else {
          skip -= TCPWire.statusBytes
        }
      }
      let length = min(reply.length - skip, room)
      if length > 0 {
        vectors[count] = iovec(
          iov_base: UnsafeMutableRawPointer(bitPattern: UInt(reply.address) + UInt(skip)),
          iov_len: length)
        count += 1
        room -= length
      }
      skip = 0
      index += 1
    }
    return count
  }

  private func consume(_ byteCount: Int) {
    var left = byteCount
    while left > 0 {
      let due = replies[replyIndex].totalBytes - replyOffset
      if left < due {
        replyOffset += left
        return
      }
      left -= due
      replyOffset = 0
      replyIndex += 1
    }
  }
}
