import CLinux
import MooncakeBase
import MooncakeSystem

/// One peer at the RPC daemon: receives a request, sends the answer, waits for the peer to close.
/// After a call of a service it rests until the next one.
final class RPCConnection {
  enum Outcome {
    /// Waits for these epoll events.
    case goOn(events: UInt32)
    case finished
    /// Not the protocol: close without an answer.
    case rejected(reason: String)
  }

  /// Bytes of memory that a connection takes.
  struct Held: Equatable {
    var own = 0
    var shared = 0
    var total: Int { own + shared }
  }

  private enum Phase {
    case receiving
    case sending
    /// The answer is out; the peer closes first so that it has certainly read it.
    case closing
  }

  private let socket: Socket
  private let peer: SocketAddress?
  private let limits: RPCServer.Limits
  private var end: Deadline
  private var phase = Phase.receiving
  private var parser: RPCMessageParser
  private var output: RPCOutput?
  private var sentByteCount = 0
  private var discardedByteCount = 0
  private var mayRest = false
  /// Whether the loop counts it among those that rest.
  var isCountedResting = false

  /// What the budget knows that it takes.
  var accounted = Held()
  /// Whose it is in the budget: the address, of IPv6 the half that names a network.
  let group: String

  /// When bytes last moved, on `Clock`.
  private(set) var lastProgress: UInt64

  /// What a peer may send behind its request before it is cut off.
  private static let maximumDiscardedBytes = 1 << 20

  init(socket: consuming Socket, limits: RPCServer.Limits) {
    // Asked now: a socket that was reset no longer tells.
    peer = try? socket.peerAddress()
    group = peer?.networkOrHost ?? ""
    self.socket = socket
    self.limits = limits
    parser = RPCMessageParser(limit: limits.messageLength)
    end = .after(milliseconds: limits.exchangeMilliseconds)
    lastProgress = Clock.now()
  }

  var rawValue: Int32 { socket.rawValue }
  var peerName: String { peer?.description ?? "a peer" }
  var hasAnswered: Bool { if case .receiving = phase { isResting } else { true } }
  /// Whether it has answered and may be asked again.
  var isResting: Bool { mayRest && parser.isEmpty && output == nil }
  var receivedByteCount: Int { parser.receivedByteCount }

  var held: Held {
    let count = output?.bytes.count ?? 0
    let isShared = output?.isShared ?? false
    return Held(own: parser.heldByteCount + (isShared ? 0 : count), shared: isShared ? count : 0)
  }

  /// When the connection has lasted too long.
  var deadline: Deadline {
    let idle = limits.idleMilliseconds &* 1_000_000
    return min(end, Deadline(nanoseconds: lastProgress &+ idle))
  }

  /// Does what the socket permits now. `scratch` is free for its use during the call; `answer`
  /// turns a request into the bytes of its answer.
  func advance(
    scratch: UnsafeMutableRawBufferPointer, answer: (RPCMessage) throws(JSONError) -> RPCOutput
  ) -> Outcome {
    do throws(Errno) {
      switch phase {
      case .receiving: return try receive(scratch, answer)
      case .sending: return try send(scratch)
      case .closing: return try discard(scratch)
      }
    } catch {
      // Reset by the peer: nobody is left to be answered or to complain about.
      return .finished
    }
  }

  private func receive(
    _ scratch: UnsafeMutableRawBufferPointer,
    _ answer: (RPCMessage) throws(JSONError) -> RPCOutput
  ) throws(Errno) -> Outcome {
    // A few rounds at a time, so that one peer's long message does not hold up the others.
    for _ in 0..<4 {
      guard let count = try socket.tryReceive(into: scratch) else {
        return .goOn(events: Epoll.readable)
      }
      if count == 0 {
        return parser.isEmpty ? .finished : .rejected(reason: "only part of a request")
      }
      lastProgress = Clock.now()
      mayRest = false
      if parser.isEmpty { end = .after(milliseconds: limits.exchangeMilliseconds) }
      let message: RPCMessage?
      var takenCount = count
      do throws(RPCMessageError) {
        let bytes = UnsafeRawBufferPointer(rebasing: scratch[..<count])
        (takenCount, message) = try parser.consume(bytes)
      } catch {
        return .rejected(reason: error.description)
      }
      guard let message else { continue }
      do throws(JSONError) {
        output = try answer(message)
        mayRest = output?.keeps == true && takenCount == count
      } catch {
        return .rejected(reason: "a request that is no JSON (\(error))")
      }
      parser = RPCMessageParser(limit: 0)
      phase = .sending
      return try send(scratch)
    }
    return .goOn(events: Epoll.readable)
  }

  private func send(_ scratch: UnsafeMutableRawBufferPointer) throws(Errno) -> Outcome {
    if let output {
      while sentByteCount < output.bytes.count {
        guard let count = try socket.trySend(output.bytes, from: sentByteCount) else {
          return .goOn(events: Epoll.writable)
        }
        sentByteCount += count
        lastProgress = Clock.now()
      }
    }
    output = nil
    if mayRest {
      (phase, sentByteCount) = (.receiving, 0)
      parser = RPCMessageParser(limit: limits.messageLength)
      return .goOn(events: Epoll.readable)
    }
    phase = .closing
    socket.shutdownWrite()
    return try discard(scratch)
  }

  private func discard(_ scratch: UnsafeMutableRawBufferPointer) throws(Errno) -> Outcome {
    while discardedByteCount < Self.maximumDiscardedBytes {
      guard let count = try socket.tryReceive(into: scratch) else {
        return .goOn(events: Epoll.readable)
      }
      if count == 0 { return .finished }
      discardedByteCount += count
    }
    return .finished
  }
}
