import CLinux
import MooncakeBase
import MooncakeSystem

/// One request to a peer's RPC daemon, from the name to the answer, under one deadline.
struct RPCCall {
  let peer: HostPort
  let type: RPCType
  let settings: HandshakeSettings
  let call: Call

  var deadline: Deadline { call.deadline }

  private static let chunkBytes = 64 << 10
  private static let hint = "is the process running and is this its RPC port?"

  func run(_ body: String) throws(MooncakeError) -> String {
    // Some peers serve one connection at a time, so close it as soon as this returns.
    let socket = try connect()
    try send(RPCMessage.encoded(type: type, body: body), on: socket)
    return try text(of: try receive(from: socket))
  }

  /// The text of an answer.
  func text(of message: RPCMessage) throws(MooncakeError) -> String {
    if message.type != type || message.isOldProtocol {
      throw failure(.protocolViolation, "it answered with a message of another type", Self.hint)
    }
    guard let text = String(validating: message.body, as: UTF8.self) else {
      throw failure(.protocolViolation, "its answer is not UTF-8", Self.hint)
    }
    return text
  }

  // MARK: Phases

  private func connect() throws(MooncakeError) -> Socket {
    guard let port = peer.port, port != 0 else {
      throw failure(.invalidArgument, "port 0 cannot be reached", "give the peer's RPC port")
    }
    let addresses: [SocketAddress]
    do throws(ResolveError) {
      addresses = try Resolver.resolve(
        peer.host, port: port, deadline: deadline, cancellation: call.cancellation)
    } catch {
      if error.isCanceled { throw canceled }
      throw failure(
        error.isTimeout ? .timeout : .unresolved, "cannot resolve \(peer.host)",
        "\(error); check the name and this machine's name service")
    }
    var last: MooncakeError?
    for (index, address) in addresses.enumerated() {
      do throws(MooncakeError) {
        return try connect(
          to: address, within: connectMilliseconds(addressCount: addresses.count - index))
      } catch {
        last = error
        if deadline.hasPassed || error.code == .canceled { break }
      }
    }
    throw last ?? failure(.unresolved, "the name has no address", "check the name")
  }

  /// Time for one address when `addressCount` are left to try, so that one that drops packets
  /// leaves time for the others.
  func connectMilliseconds(addressCount: Int) -> UInt64 {
    let left = deadline.remainingNanoseconds / 1_000_000
    return min(settings.connectTimeoutMilliseconds, left / UInt64(max(1, addressCount)) + 1)
  }

  private func connect(
    to address: SocketAddress, within milliseconds: UInt64
  ) throws(MooncakeError) -> Socket {
    let ownLimit = Deadline.after(milliseconds: milliseconds)
    do throws(Errno) {
      let socket = try Socket(family: address.family)
      try socket.startConnect(to: address)
      try socket.wait(for: POLLOUT, until: min(deadline, ownLimit), cancellation: call.cancellation)
      if let error = socket.takeError() { throw error }
      // Connecting to a port of the ephemeral range without a listener may connect the socket to
      // itself.
      if try socket.localAddress() == address { throw .connectionRefused }
      socket.setNoDelay()
      return socket
    } catch {
      throw connectFailure(error, to: address, within: milliseconds)
    }
  }

  func connectFailure(
    _ error: Errno, to address: SocketAddress, within milliseconds: UInt64
  ) -> MooncakeError {
    // A numeric host is not repeated.
    let place = address.host == peer.host ? "" : " to \(address)"
    switch error.rawValue {
    case ECANCELED: return canceled
    case ECONNREFUSED:
      return failure(.unreachable, "connect\(place) refused", Self.hint)
    case ETIMEDOUT where deadline.hasPassed:
      return failure(
        .timeout, "connect\(place) not answered before the deadline",
        "is the host up, and does no firewall drop the packets?")
    case ETIMEDOUT:
      return failure(
        .unreachable,
        "connect\(place) not answered within \(milliseconds) ms",
        "is the host up, and does no firewall drop the packets?")
    case EMFILE, ENFILE, ENOBUFS, ENOMEM, EADDRNOTAVAIL:
      return failure(.system, "cannot connect\(place)", "\(error); raise the limit")
    default:
      return failure(
        .unreachable, "connect\(place) failed", "\(error); check the address and the network")
    }
  }

  private func send(_ bytes: [UInt8], on socket: borrowing Socket) throws(MooncakeError) {
    var sentByteCount = 0
    do throws(Errno) {
      while sentByteCount < bytes.count {
        if let count = try socket.trySend(bytes, from: sentByteCount) {
          sentByteCount += count
        } else {
          try socket.wait(for: POLLOUT, until: deadline, cancellation: call.cancellation)
        }
      }
    } catch {
      throw broken(error, "the request was sent")
    }
  }

  private func receive(from socket: borrowing Socket) throws(MooncakeError) -> RPCMessage {
    var parser = RPCMessageParser(limit: settings.maximumLength)
    let chunk = UnsafeMutableRawBufferPointer.allocate(byteCount: Self.chunkBytes, alignment: 16)
    defer { chunk.deallocate() }
    while true {
      let count: Int
      do throws(Errno) {
        guard let received = try socket.tryReceive(into: chunk) else {
          try socket.wait(for: POLLIN, until: deadline, cancellation: call.cancellation)
          continue
        }
        count = received
      } catch {
        throw broken(error, "the answer was awaited")
      }
      if count == 0 { throw closed(afterBytes: parser.receivedByteCount) }
      let received = UnsafeRawBufferPointer(rebasing: chunk[..<count])
      do throws(RPCMessageError) {
        if let message = try parser.consume(received).message { return message }
      } catch {
        throw malformed(error)
      }
      // Not before: a whole answer counts, even if this thread was late to read it. But a peer that
      // sends without pause must not outlast the deadline.
      if deadline.hasPassed { throw broken(.timedOut, "the answer was received") }
    }
  }

  // MARK: Errors

  private var canceled: MooncakeError {
    failure(
      .canceled, "given up because it was canceled or the engine was destroyed",
      "call again if it is still wanted")
  }

  func closed(afterBytes count: Int) -> MooncakeError {
    failure(
      .unreachable,
      count == 0
        ? "it closed the connection without an answer"
        : "it closed the connection after \(count) bytes of its answer",
      "it refused the request or is stopping; is this its RPC port?")
  }

  func malformed(_ error: RPCMessageError) -> MooncakeError {
    failure(.protocolViolation, "it sent \(error)", remedy(for: error))
  }

  func broken(_ error: Errno, _ moment: String) -> MooncakeError {
    if error.rawValue == ECANCELED { return canceled }
    if error == .timedOut && deadline.hasPassed {
      return failure(
        .timeout, "the deadline passed while \(moment)",
        "is the process stopped or overloaded, and is this its RPC port?")
    }
    return failure(.unreachable, "the connection broke while \(moment)", "\(error); \(Self.hint)")
  }

  private func remedy(for error: RPCMessageError) -> String {
    if case .tooLong(let announced, _) = error, announced <= 128 << 20 {
      return "raise MC_HANDSHAKE_MAX_LENGTH in this process"
    }
    return Self.hint
  }

  private func failure(
    _ code: MooncakeError.Code, _ cause: String, _ remedy: String
  ) -> MooncakeError {
    MooncakeError(code, "peer \(peer): \(cause) (\(type) RPC): \(remedy)")
  }
}
