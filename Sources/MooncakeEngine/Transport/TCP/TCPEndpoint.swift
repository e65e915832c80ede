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
  var state = State.idle
  private var socket: Socket?
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
  /// A bound below every queued slice's deadline.
  var earliestDeadline = UInt64.max
  var failingSince: UInt64 = 0
  var restNanoseconds: UInt64 = 0
  var lastUse: UInt64 = 0
  var turn = BulkTurn()
  /// Bytes that must have arrived before the socket counts as readable.
  var lowWater = 1
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

  /// Takes over what other threads queued.
  func takeInbox() {
    var new = inbox.takeAll()
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
    // Still in progress: a spurious wake-up.
    guard let remote = try? socket?.peerAddress() else { return }
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

  private func connectFailed(_ error: Errno) {
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
  private func rest() {
    let now = Clock.now()
    if failingSince == 0 { failingSince = now }
    restNanoseconds = min(
      max(restNanoseconds * 2, Self.firstRestNanoseconds), Self.longestRestNanoseconds)
    state = .resting(until: now + restNanoseconds)
    peer.reportTrouble()
    if now - failingSince >= Self.failureWindowNanoseconds {
      let error = lastError
      while !queue.isEmpty { endFirst(.failed(error.code), reason: error.message) }
      earliestDeadline = .max
      sendSlice = nil
    }
  }

  func closeSocket() {
    guard let socket = socket.take() else { return }
    loop.unwatch(socket.rawValue, token: token)
    if case .connected = state {
      loop.counters.clientConnections.wrappingSubtract(1, ordering: .relaxed)
    }
    state = .idle
    descriptor = -1
    wantsWritable = false
    lowWater = 1
    rewind()
  }

  /// The next connection sends everything from the start.
  private func rewind() {
    var cursor = queue.first
    for _ in 0..<sentCount + (sendOffset > 0 ? 1 : 0) {
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
    // A turn that ended by silence would wait for a sign of life that the former connection owed.
    turn = BulkTurn()
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

  /// Takes the connection out of use after an error and decides what becomes of its slices.
  func disconnect(_ error: EngineError, blames: Bool = true) {
    loop.counters.clientDisconnects.wrappingAdd(1, ordering: .relaxed)
    lastError = error
    var sent = sentCount + (sendOffset > 0 ? 1 : 0)
    closeSocket()
    if blames {
      // Slices on the wire may be tried again, but not forever.
      let exhausted = queue.removeAll { slice in
        defer { sent -= 1 }
        guard sent > 0 else { return false }
        slice.pointee.attempts += 1
        return slice.pointee.attempts >= Self.attemptLimit
      }
      endAll(exhausted, .failed(error.code), error.message)
      sendSlice = queue.first
      loop.counters.retries.wrappingAdd(UInt64(queue.count), ordering: .relaxed)
      rest()
    }
  }

  func endAll(_ slices: consuming SliceQueue, _ outcome: Outcome, _ reason: String) {
    var slices = slices
    while let slice = slices.popFirst() { end(slice, outcome, reason: reason) }
  }
}

// MARK: - Deadlines, cancellation, retirement

extension TCPEndpoint {
  /// When the endpoint needs attention although nothing happens on its socket.
  var nextTimer: UInt64 {
    switch state {
    case .connecting(let until), .resting(let until): min(until, earliestDeadline)
    case .idle: queue.isEmpty ? .max : 0
    case .connected: earliestDeadline
    }
  }

  /// Does what `nextTimer` announced.
  func attend(_ now: UInt64, sweeps: Bool) {
    if case .connecting(let until) = state, now >= until { connectFailed(.timedOut) }
    if sweeps || now >= earliestDeadline { sweep(now) }
    switch state {
    case .idle, .resting: _ = progress()
    case .connecting, .connected: break
    }
  }

  /// Ends slices whose deadline has passed or whose batch is canceled, and hands over the rest of a
  /// retired peer.
  func sweep(_ now: UInt64) {
    func isDue(_ slice: SlicePointer) -> Bool {
      slice.pointee.deadline <= now || slice.pointee.batch.isCancelRequested
    }
    // Only then is the socket closed: afterwards no byte arrives for what is ended below.
    let phases = describeProgress()
    var index = 0
    let sentBound = sentCount + (sendOffset > 0 ? 1 : 0)
    var breaksConnection = false
    var cursor = queue.first
    while let slice = cursor, index < sentBound {
      if isDue(slice) { breaksConnection = true }
      cursor = slice.pointee.next
      index += 1
    }
    if breaksConnection { disconnect(lastError, blames: false) }
    var due = queue.removeAll(where: isDue)
    sendSlice = breaksConnection ? queue.first : firstUnsent
    earliestDeadline = .max
    cursor = queue.first
    while let slice = cursor {
      earliestDeadline = min(earliestDeadline, slice.pointee.deadline)
      cursor = slice.pointee.next
    }
    while let slice = due.popFirst() {
      if slice.pointee.batch.isCancelRequested {
        end(slice, .canceled, reason: "\(peer.description): canceled")
      } else {
        end(slice, .timeout, reason: describeTimeout(slice, phases))
      }
    }
    if peer.isRetired { retire() }
  }

  /// The list below the sent bound is unchanged when nothing there was due.
  private var firstUnsent: SlicePointer? {
    var cursor = queue.first
    var index = 0
    while let slice = cursor, index < sentCount {
      cursor = slice.pointee.next
      index += 1
    }
    return cursor
  }

  private func describeProgress() -> String {
    switch state {
    case .idle: return "waiting for a connection"
    case .connecting: return "connecting"
    case .resting: return "waiting to connect again after: \(lastError.message)"
    case .connected:
      if receiveOffset > 0 { return "receiving the answer, \(receiveOffset) bytes of it arrived" }
      if sentCount > 0 { return "waiting for the peer's answer" }
      return sendOffset > 0 ? "sending, \(sendOffset) bytes are out" : "waiting to be sent"
    }
  }

  private func describeTimeout(_ slice: SlicePointer, _ phase: String) -> String {
    "\(peer.description): \(slice.pointee.opcode) of \(slice.pointee.length) bytes at "
      + "0x\(String(slice.pointee.remote, radix: 16)): deadline passed while \(phase)"
      + (lastError.code == .system ? "" : ": is the peer alive and the timeout long enough?")
  }

  private func retire() {
    if queue.isEmpty { return closeSocket() }
    guard let successor = peer.successor else { return }
    if case .connected = state { disconnect(lastError, blames: false) } else { closeSocket() }
    state = .idle
    var moved = queue
    queue = SliceQueue()
    rewind()
    earliestDeadline = .max
    while let slice = moved.popFirst() {
      load.wrappingSubtract(slice.pointee.length, ordering: .relaxed)
      if slice.pointee.wasSent && successor.isRestarted {
        loop.count(slice, .failed(.unreachable))
        Batch.end(
          slice, .failed(.unreachable),
          reason: "\(peer.description): the peer restarted in mid-transfer; its buffers are new")
      } else {
        successor.resubmit(slice)
      }
    }
  }

  /// Ends everything; the loop is stopping.
  func shutDown() {
    takeInbox()
    closeSocket()
    while !queue.isEmpty { endFirst(.canceled, reason: "\(peer.description): engine destroyed") }
  }
}
