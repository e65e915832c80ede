import CLinux
import MooncakeBase
import MooncakeSystem

/// One call in progress: connecting, sending, or waiting for the answer. Once submitted, only the
/// caller's thread uses it.
final class RPCQuestion: @unchecked Sendable {
  // Unchecked: handed over exactly once, through the loop's mailbox.
  enum Outcome {
    /// Call `advance` again after one of these epoll events.
    case goOn(events: UInt32)
    case ended(Result<String, MooncakeError>)
    /// The kept connection was closed meanwhile: try a new one.
    case retry
  }

  let call: RPCCall
  let address: SocketAddress
  private let bytes: [UInt8]
  private let completion: RPCCaller.Completion
  /// How many addresses of the peer share the remaining time, including this one.
  private let addressCount: Int
  private var connectMilliseconds: UInt64 = 0
  private var connectEnd = Deadline.never
  private var socket: Socket?
  private var isConnected = false
  private var isReused = false
  private var sentCount = 0
  private var parser: RPCMessageParser

  init(
    call: RPCCall, address: SocketAddress, addressCount: Int, bytes: [UInt8],
    completion: @escaping RPCCaller.Completion
  ) {
    self.call = call
    self.address = address
    self.addressCount = addressCount
    self.bytes = bytes
    self.completion = completion
    parser = RPCMessageParser(limit: call.settings.maximumLength)
  }

  var descriptor: Int32 { socket?.rawValue ?? -1 }

  /// When it times out.
  var end: Deadline { isConnected ? call.deadline : min(call.deadline, connectEnd) }

  func finish(_ result: Result<String, MooncakeError>) { completion(result) }

  /// Takes over an open connection.
  func reuse(_ kept: consuming Socket) {
    socket = consume kept
    (isConnected, isReused) = (true, true)
  }

  func connect() throws(MooncakeError) {
    (isConnected, isReused, sentCount) = (false, false, 0)
    parser = RPCMessageParser(limit: call.settings.maximumLength)
    socket = nil
    connectMilliseconds = call.connectMilliseconds(addressCount: addressCount)
    connectEnd = .after(milliseconds: connectMilliseconds)
    do throws(Errno) {
      let new = try Socket(family: address.family)
      try new.startConnect(to: address)
      socket = consume new
    } catch {
      throw connectFailure(error)
    }
  }

  /// The connection, if it can be reused.
  func takeSocket() -> Socket? { socket.take() }

  /// Does as much as the socket permits now.
  func advance(_ scratch: UnsafeMutableRawBufferPointer) -> Outcome {
    do throws(MooncakeError) {
      if !isConnected {
        do throws(Errno) { try finishConnect() } catch { throw connectFailure(error) }
      }
      do throws(Errno) {
        while sentCount < bytes.count {
          guard let count = try socket?.trySend(bytes, from: sentCount) else {
            return .goOn(events: Epoll.writable)
          }
          sentCount += count
        }
        return try receive(scratch)
      } catch {
        if isReused && parser.isEmpty { return .retry }
        throw call.broken(error, "the answer was awaited")
      }
    } catch {
      return .ended(.failure(error))
    }
  }

  func fail(_ error: Errno) -> MooncakeError {
    isConnected ? call.broken(error, "the answer was awaited") : connectFailure(error)
  }

  func connectFailure(_ error: Errno) -> MooncakeError {
    call.connectFailure(error, to: address, within: connectMilliseconds)
  }

  private func finishConnect() throws(Errno) {
    if let error = socket?.takeError() { throw error }
    // Connecting to a port of the ephemeral range without a listener may connect the socket to
    // itself.
    if try socket?.localAddress() == address { throw .connectionRefused }
    socket?.setNoDelay()
    isConnected = true
  }

  private func receive(_ scratch: UnsafeMutableRawBufferPointer) throws(Errno) -> Outcome {
    // A few rounds at a time, so that one long answer does not hold up the others.
    for _ in 0..<4 {
      guard let count = try socket?.tryReceive(into: scratch) else {
        return .goOn(events: Epoll.readable)
      }
      if count == 0 {
        return isReused && parser.isEmpty
          ? .retry : .ended(.failure(call.closed(afterBytes: parser.receivedByteCount)))
      }
      do throws(RPCMessageError) {
        let received = UnsafeRawBufferPointer(rebasing: scratch[..<count])
        if let message = try parser.consume(received).message { return .ended(text(of: message)) }
      } catch {
        return .ended(.failure(call.malformed(error)))
      }
    }
    return .goOn(events: Epoll.readable)
  }

  private func text(of message: RPCMessage) -> Result<String, MooncakeError> {
    do throws(MooncakeError) { return .success(try call.text(of: message)) } catch {
      return .failure(error)
    }
  }
}
