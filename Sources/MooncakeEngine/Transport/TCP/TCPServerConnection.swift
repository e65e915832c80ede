import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// One accepted connection: parses requests, stores written data, answers in order. Confined to the
/// thread of its loop.
final class TCPServerConnection {
  private enum Phase {
    case open
    /// The peer has finished sending: answer its requests, then close.
    case ending
    /// A refusal is queued: send the answers, then end the stream.
    case refusing
    /// A version 1 refusal is a reset: there is no status, and an orderly end would mean success.
    case resetting
    /// Input is discarded, so that no reset overtakes the refusal.
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
  /// After the header of a large write the next header is read without what follows it, so that the
  /// data of another large write goes straight to its place.
  private var expectsLargeWrite = false

  private var replies = ReplyQueue()
  private var isBlocked = false

  /// From this size on a system call for each write costs less than a second copy.
  private static let largeBytes = 16 << 10
  private static let turnLimitBytes = 4 << 20
  private static let drainLimitBytes = 256 << 20
  private static let drainLimitNanoseconds: UInt64 = 2_000_000_000

  init(socket: consuming Socket, peer: String) {
    self.socket = socket
    self.peer = peer
  }

  deinit { partialHeader.deallocate() }

  /// Whether a request of the connection touches one of the ranges.
  func touches(_ ranges: [RemoteBuffer]) -> Bool {
    if writeRemaining > 0, ranges.contains(where: { $0.touches(writeAddress, writeRemaining) }) {
      return true
    }
    return replies.touches(ranges)
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
    if !replies.isFull, case .open = phase {
      next = receive(loop)
      if case .close = next { return .close }
    }
    if case .close = flush(loop) { return .close }
    if case .resetting = phase {
      socket.resetOnClose()
      return .close
    }
    if case .ending = phase, replies.isEmpty { return .close }
    if case .refusing = phase, replies.isEmpty {
      socket.shutdownWrite()
      phase = .draining(until: Clock.now() + Self.drainLimitNanoseconds, byteCount: 0)
      next = .again
    }
    updateInterest()
    return isBlocked ? .keep : next
  }

  private func updateInterest() {
    var wanted: UInt32 = isBlocked ? Epoll.writable : 0
    switch phase {
    case .open: if !replies.isFull { wanted |= Epoll.readable }
    case .ending, .refusing, .resetting: break
    case .draining: wanted |= Epoll.readable
    }
    interest = wanted
  }
}

// MARK: - Receiving

extension TCPServerConnection {
  private func receive(_ loop: TCPServerLoop) -> Next {
    var budget = Self.turnLimitBytes
    while budget > 0 {
      let count = writeRemaining > 0 ? receiveIntoPlace(loop) : receiveRequests(loop)
      if count == -Int(EAGAIN) { return .keep }
      if count < 0 { return .close }
      if count == 0 {
        phase = .ending
        return .keep
      }
      budget -= count
      if replies.isFull { return .again }
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
    if expectsLargeWrite { loop.noteLargeRequest() }
    if count < writeRemaining {
      writeAddress += UInt64(count)
      writeRemaining -= count
      return count
    }
    let rest = count - writeRemaining
    writeRemaining = 0
    finishWrite(loop)
    return execute(rest, loop) ? count : -Int(EFAULT)
  }

  /// Receives headers and the data of small writes that follows them.
  private func receiveRequests(_ loop: TCPServerLoop) -> Int {
    let input = loop.input.address
    input.copyMemory(from: partialHeader, byteCount: partialCount)
    let count = recv(
      socket.rawValue, input + partialCount, requestLimit - partialCount, 0)
    if count <= 0 { return count == 0 ? 0 : failure(loop, "receiving requests") }
    loop.countReceived(count)
    return execute(partialCount + count, loop) ? count : -Int(EFAULT)
  }

  private var requestLimit: Int {
    expectsLargeWrite ? TCPWire.headerBytes : ScatterBuffer.byteCount
  }

  /// Executes the buffered requests; false if a target cannot be written.
  private func execute(_ total: Int, _ loop: TCPServerLoop) -> Bool {
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
    expectsLargeWrite = header.opcode == .write && header.size >= UInt64(Self.largeBytes)
    let verdict = loop.check(header)
    if verdict == .allowed {
      if header.opcode == .read {
        replies.addData(header.address, Int(header.size), hasStatus: header.isAcknowledged)
        loop.countRequest()
      }
      return true
    }
    loop.countRejection(header, verdict, peer)
    if header.isAcknowledged {
      phase = .refusing
      replies.addRefusal()
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
    if writeIsAcknowledged { replies.addDone() }
  }

  private func drain(_ loop: TCPServerLoop) -> Next {
    guard case .draining(let until, var byteCount) = phase else { return .close }
    while byteCount < Self.drainLimitBytes && Clock.now() < until {
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
    var budget = Self.turnLimitBytes
    isBlocked = false
    while !replies.isEmpty {
      if budget <= 0 {
        // Others have their turn; the socket is writable, so the loop comes back at once.
        isBlocked = true
        return .keep
      }
      var message = msghdr()
      message.msg_iov = loop.vectors
      message.msg_iovlen = replies.gather(into: loop.vectors)
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
      if replies.firstLength >= Self.largeBytes { loop.noteLargeRequest() }
      replies.advance(count)
    }
    return .keep
  }
}
