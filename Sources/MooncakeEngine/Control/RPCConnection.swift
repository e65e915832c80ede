import CLinux
import MooncakeBase
import MooncakeSystem

/// One peer's connection at the RPC daemon: receives a request, sends the answer, waits for the
/// peer to close. After a service call it may rest until the next one.
final class RPCConnection {
  enum Outcome {
    /// Call `advance` again after one of these epoll events.
    case goOn(events: UInt32)
    case finished
    /// Not our protocol: close without an answer.
    case rejected(reason: String)
  }

  /// Bytes of memory that a connection holds.
  struct Held: Equatable {
    var own = 0
    var shared = 0
    var total: Int { own + shared }
  }

  private enum Phase {
    case receiving
    case sending
    /// The answer is sent. The peer closes first: an earlier close could reset the connection
    /// before it has read it.
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
  /// Whether the loop counts it as resting.
  var isCountedResting = false

  /// The amount recorded in the budget.
  var accounted = Held()
  /// Its peer in the budget: the address, or the /64 network for IPv6.
  let group: String

  /// When bytes last moved, on `Clock`.
  private(set) var lastProgress: UInt64

  /// Bytes a peer may send after its request before it is cut off.
  private static let maximumDiscardedBytes = 1 << 20

  init(socket: consuming Socket, limits: RPCServer.Limits) {
    // Read now: a socket that has been reset no longer tells.
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
  /// Whether it has answered and may get another request.
  var isResting: Bool { mayRest && parser.isEmpty && output == nil }
  var receivedByteCount: Int { parser.receivedByteCount }

  var held: Held {
    let count = output?.bytes.count ?? 0
    let isShared = output?.isShared ?? false
    return Held(own: parser.heldByteCount + (isShared ? 0 : count), shared: isShared ? count : 0)
  }

  /// When to close the connection as too slow.
  var deadline: Deadline {
    let idle = limits.idleMilliseconds &* 1_000_000
    return min(end, Deadline(nanoseconds: lastProgress &+ idle))
  }

  /// Does as much as the socket permits now. `scratch` may be overwritten; `answer` turns a request
  /// into its answer.
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
      // Reset by the peer, so there is nobody to answer and nothing to report.
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
        return .rejected(reason: "a request that is not JSON (\(error))")
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
