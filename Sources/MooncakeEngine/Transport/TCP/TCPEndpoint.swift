import CLinux
import Glibc
import MooncakeSystem
import Synchronization

/// One data connection to a peer, made anew whenever it is needed and broken.
///
/// Any thread queues slices through `push`; everything else belongs to whoever drives the loop. The
/// queue is one list: the slices up to `sendSlice` are on the wire and answered in order, the rest
/// wait to be sent. A broken connection rewinds the list, since reads and writes may be repeated
/// until they are terminal.
package final class TCPEndpoint: @unchecked Sendable {
  // Unchecked: `inbox`, `isScheduled` and `load` are atomic, the rest is confined as said above.
  enum State {
    case idle
    case connecting(until: UInt64)
    case connected
    /// Waits before the next attempt.
    case resting(until: UInt64)
  }

  let peer: TCPPeer
  // The transport's loops outlive its endpoints' use.
  package unowned(unsafe) let loop: TCPClientLoop
  let inbox = SliceInbox()
  let isScheduled = Atomic<Bool>(false)
  /// Link of the loop's ready stack, owned by who set `isScheduled`.
  var nextReady: UInt = 0
  /// Bytes queued and not ended, for choosing the least busy connection.
  package let load = Atomic<Int>(0)

  var queue = SliceQueue()
  /// Writes that wait until nothing of an earlier one can land where they go.
  var held = SliceQueue()
  var state = State.idle
  var socket: Socket?
  /// The socket's descriptor while there is one.
  private(set) var descriptor: Int32 = -1
  var token: UInt64 = 0
  var wantsWritable = false
  var isActive = false
  var isRetired = false

  /// The first slice that is not completely sent; nil when all are.
  var sendSlice: SlicePointer?
  var sendOffset = 0
  var sentCount = 0
  /// Bytes of the first slice's answer that have arrived.
  var receiveOffset = 0
  /// What of a status frame has arrived when it came in two parts.
  var partialStatus: UInt64 = 0
  /// After a fault one slice goes alone, so that the fault is known to be its own.
  var sendsAlone = false
  var receivesAlone = false
  /// A bound below the deadline of every slice, queued or held.
  var earliestDeadline = UInt64.max
  var failingSince: UInt64 = 0
  var restNanoseconds: UInt64 = 0
  var lastUse: UInt64 = 0
  var lastError = EngineError(.unreachable, "")

  static let inflightLimit = 1024
  static let attemptLimit = 5
  /// After so many failed connections a slice is sent alone, so that it harms no other.
  static let suspectAttempts = 3
  static let connectNanoseconds: UInt64 = 5_000_000_000
  /// How long a peer that refuses or drops connections is tried before its transfers fail.
  static let failureWindowNanoseconds: UInt64 = 3_000_000_000
  static let firstRestNanoseconds: UInt64 = 5_000_000
  static let longestRestNanoseconds: UInt64 = 500_000_000
  static let patienceMilliseconds: Int32 = 24 * 3600 * 1000

  init(peer: TCPPeer, loop: TCPClientLoop) {
    self.peer = peer
    self.loop = loop
  }

  /// Queues slices from any thread; `loop.kick` or driving must follow.
  package func push(_ slices: consuming SliceQueue, byteCount: Int) {
    load.wrappingAdd(byteCount, ordering: .relaxed)
    inbox.push(slices)
    loop.schedule(self)
  }

  var isAcknowledged: Bool { peer.usesAcknowledgments }

  var isConnected: Bool {
    if case .connected = state { return true }
    return false
  }

  var hasSlices: Bool { !queue.isEmpty || !held.isEmpty }

  /// How many slices of the queue the connection carries, whole or in part.
  var onWireCount: Int { sentCount + (sendOffset > 0 ? 1 : 0) }

  /// Takes over what other threads queued.
  func takeInbox() {
    var new = inbox.takeAll()
    if !new.isEmpty && !peer.unfenced.isEmpty { hold(&new) }
    guard let first = new.first else { return }
    var slice: SlicePointer? = first
    while let current = slice {
      // A batch canceled between its submit and now missed the sweep: another must come.
      let isCanceled = current.pointee.batch.isCancelRequested
      earliestDeadline = isCanceled ? 0 : min(earliestDeadline, current.pointee.deadline)
      slice = current.pointee.next
    }
    if sendSlice == nil { sendSlice = first }
    queue.append(contentsOf: &new)
  }

  /// Ends the first slice of the queue.
  @inline(__always)
  func endFirst(_ outcome: Outcome, reason: @autoclosure () -> String = "") {
    guard let slice = queue.first else { return }
    let next = slice.pointee.next
    if sendSlice == slice {
      sendSlice = next
      sendOffset = 0
    } else {
      sentCount -= 1
    }
    _ = queue.popFirst()
    end(slice, outcome, reason: reason())
  }

  @inline(__always)
  func end(_ slice: SlicePointer, _ outcome: Outcome, reason: @autoclosure () -> String = "") {
    load.wrappingSubtract(slice.pointee.length, ordering: .relaxed)
    loop.count(slice, outcome)
    Batch.end(slice, outcome, reason: reason())
  }
}

// MARK: - Connecting

extension TCPEndpoint {
  /// Moves on whatever can be moved; returns whether anything was.
  func progress() -> Bool {
    switch state {
    case .idle:
      if queue.isEmpty { return false }
      startConnect()
      return true
    case .resting(let until):
      if queue.isEmpty || Clock.now() < until { return false }
      startConnect()
      return true
    case .connecting: return false
    case .connected:
      let sent = send()
      guard case .connected = state else { return true }
      let received = receive()
      if received { sendBehindAnswers() }
      return received || sent
    }
  }

  /// Handles readiness that epoll reported.
  func handle(_ events: UInt32) {
    if case .connecting = state { return finishConnect() }
    guard case .connected = state else { return }
    if events & Epoll.writable != 0 { _ = send() }
    guard case .connected = state else { return }
    // Without requests in flight readability means that the peer closed or talks out of turn.
    if queue.isEmpty { return closeIdle() }
    if events & ~Epoll.writable == 0 { return }
    _ = receive()
    sendBehindAnswers()
  }

  /// Answers make room for what waited for them; nothing else would send it.
  private func sendBehindAnswers() {
    if case .connected = state, !wantsWritable, maySend { _ = send() }
  }

  private func startConnect() {
    let address = peer.nextAddress()
    do throws(Errno) {
      let socket = try Socket(family: address.family)
      socket.setNoDelay()
      if address.isLoopback { socket.setLocal(bufferBytes: TCPWire.localSocketBufferBytes) }
      // Deadlines decide how long a peer is waited for. A connection that the kernel gives up
      // leaves open what becomes of its writes.
      socket.setPatience(milliseconds: Self.patienceMilliseconds)
      try socket.startConnect(to: address)
      token = try loop.watch(socket.rawValue, events: Epoll.writable | Epoll.readable, for: self)
      wantsWritable = true
      descriptor = socket.rawValue
      self.socket = consume socket
      state = .connecting(until: Clock.now() &+ Self.connectNanoseconds)
    } catch {
      connectFailed(error)
    }
  }

  private func finishConnect() {
    if let error = socket?.takeError() { return connectFailed(error) }
    let remote: SocketAddress?
    do throws(Errno) { remote = try socket?.peerAddress() } catch {
      // Without a peer it is still in progress: a spurious wake-up.
      return error.rawValue == ENOTCONN ? () : connectFailed(error)
    }
    // A port of the ephemeral range that nobody listens on can connect to itself.
    if remote == (try? socket?.localAddress()) { return connectFailed(.connectionRefused) }
    state = .connected
    failingSince = 0
    restNanoseconds = 0
    lastUse = Clock.now()
    loop.counters.clientConnections.wrappingAdd(1, ordering: .relaxed)
    updateInterest(blocked: false)
    _ = send()
  }

  func connectFailed(_ error: Errno) {
    loop.counters.clientConnectFailures.wrappingAdd(1, ordering: .relaxed)
    lastError = describeConnect(error)
    closeSocket()
    rest()
  }

  private func describeConnect(_ error: Errno) -> EngineError {
    let what = "\(peer.description): connect: \(error)"
    switch error {
    case .connectionRefused: return EngineError(.unreachable, "\(what): has the process ended?")
    case .tooManyOpenFiles, .tooManyOpenFilesInSystem: return EngineError(.system, what)
    default: return EngineError(.unreachable, what)
    }
  }

  /// Waits before the next connect; gives up on what is queued when the peer has failed too long.
  func rest() {
    let now = Clock.now()
    if failingSince == 0 { failingSince = now }
    restNanoseconds = min(
      max(restNanoseconds * 2, Self.firstRestNanoseconds), Self.longestRestNanoseconds)
    state = .resting(until: now + restNanoseconds)
    peer.reportTrouble()
    if now - failingSince >= Self.failureWindowNanoseconds {
      let error = lastError
      endAll(queue.takeAll(), .failed(error.code), error.message)
      endAll(held.takeAll(), .failed(error.code), error.message)
      earliestDeadline = .max
      sendSlice = nil
    }
  }

  func closeSocket() { _ = takeSocket() }

  /// Takes the connection out of use; it is closed with the result.
  func takeSocket() -> Socket? {
    guard let socket = socket.take() else { return nil }
    loop.unwatch(socket.rawValue, token: token)
    if case .connected = state {
      loop.counters.clientConnections.wrappingSubtract(1, ordering: .relaxed)
    }
    state = .idle
    descriptor = -1
    wantsWritable = false
    rewind()
    return socket
  }

  /// The next connection sends everything from the start.
  func rewind() {
    var cursor = queue.first
    for _ in 0..<onWireCount {
      guard let slice = cursor else { break }
      slice.pointee.wasSent = true
      cursor = slice.pointee.next
    }
    sendSlice = queue.first
    sendOffset = 0
    receiveOffset = 0
    sentCount = 0
    sendsAlone = false
    receivesAlone = false
  }

  private func closeIdle() {
    closeSocket()
    loop.counters.clientDisconnects.wrappingAdd(1, ordering: .relaxed)
  }

  /// A connection that rested is probed before it carries a request: the peer may have restarted.
  func probeIdle() {
    guard case .connected = state, queue.isEmpty else { return }
    if peer.isOneShot { return }
    let now = Clock.now()
    if now - lastUse < 1_000_000 { return }
    var byte: UInt8 = 0
    let count = recv(
      descriptor, &byte, 1, Int32(MSG_PEEK) | Int32(MSG_DONTWAIT))
    if count >= 0 || errno != EAGAIN { closeIdle() }
  }

  func endAll(_ slices: consuming SliceQueue, _ outcome: Outcome, _ reason: String) {
    var slices = slices
    while let slice = slices.popFirst() {
      end(slice, outcome, reason: reason + lateStoreNote(slice, after: "."))
    }
  }
}
