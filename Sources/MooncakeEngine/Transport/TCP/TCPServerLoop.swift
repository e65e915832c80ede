import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// A thread that serves accepted connections.
final class TCPServerLoop: @unchecked Sendable {
  // Unchecked: mailbox and counters are synchronized, the rest is confined to the thread.
  private enum Message {
    case adopt(Int32, String)
    case revoke([RemoteBuffer], Acknowledgment)
    case stop
  }

  /// Lets a thread wait until every loop has done what it was told.
  final class Acknowledgment: Sendable {
    private let remaining: Futex

    init(_ count: Int) { remaining = Futex(UInt32(count)) }

    func arrive() {
      remaining.decrement()
      remaining.wakeAll()
    }

    func wait() {
      while true {
        let left = remaining.value
        if left == 0 { return }
        remaining.wait(while: left, until: .never)
      }
    }
  }

  let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: TCPWire.vectorLimit)
  var input: ScatterBuffer
  private let epoll: Epoll
  private let wakeup: EventFD
  private struct Mailbox {
    var messages: [Message] = []
    var isClosed = false
  }
  private let mailbox = Lock(Mailbox())
  private let buffers: BufferTable
  private let counters: TCPCounters
  private let spinNanoseconds: UInt64

  private var table = RangeTable([])
  private var tableVersion: UInt64 = 0
  private var connections: [UInt64: TCPServerConnection] = [:]
  private var nextToken: UInt64 = 1
  private var unfinishedTokens: [UInt64] = []
  private var drainingTokens: Set<UInt64> = []
  private var isStopping = false
  private var turnBytes = 0
  private var hasMovedLargeRequest = false

  private static let wakeupToken: UInt64 = 0
  private static let eventCount = 128
  /// After a turn that moved more, the loop does not spin: the peer needs the processor more.
  private static let spinLimitBytes = 64 << 10

  init(buffers: BufferTable, counters: TCPCounters, spinNanoseconds: UInt64) throws(Errno) {
    self.buffers = buffers
    self.counters = counters
    // Longer than a round trip in which both ends had to be woken. Otherwise a pair that once slept
    // would sleep, and wake each other, for every further request.
    self.spinNanoseconds = 4 &* spinNanoseconds
    input = try ScatterBuffer()
    epoll = try Epoll()
    wakeup = try EventFD()
    try epoll.add(wakeup.descriptor.rawValue, events: Epoll.readable, token: Self.wakeupToken)
  }

  deinit { vectors.deallocate() }

  // MARK: Any thread

  func adopt(_ socket: consuming Socket, peer: String) {
    post(.adopt(socket.release(), peer))
  }

  /// Closes connections in the middle of a request on one of the ranges.
  func revoke(_ ranges: [RemoteBuffer], _ acknowledgment: Acknowledgment) {
    post(.revoke(ranges, acknowledgment))
  }

  func stop() { post(.stop) }

  private func post(_ message: Message) {
    let isClosed = mailbox.withLock { mailbox in
      if !mailbox.isClosed { mailbox.messages.append(message) }
      return mailbox.isClosed
    }
    if !isClosed { return wakeup.signal() }
    // The thread has closed its connections and reads no more messages.
    switch message {
    case .adopt(let descriptor, _): Glibc.close(descriptor)
    case .revoke(_, let acknowledgment): acknowledgment.arrive()
    case .stop: break
    }
  }

  // MARK: The thread

  func run() {
    let events = UnsafeMutableBufferPointer<epoll_event>.allocate(capacity: Self.eventCount)
    defer { events.deallocate() }
    var lastActivity: UInt64 = 0
    while !isStopping {
      let spins = lastActivity != 0 && Clock.elapsed(since: lastActivity) < spinNanoseconds
      let timeout: Int32 = spins || !unfinishedTokens.isEmpty ? 0 : drainTimeout()
      let count = epoll.wait(into: events, timeoutMilliseconds: timeout)
      expireDrains()
      if count == 0 && unfinishedTokens.isEmpty {
        // After a large request others may be in the middle of theirs and need the processor.
        if spins { if hasMovedLargeRequest { yieldProcessor() } else { relaxProcessor() } }
        continue
      }
      turnBytes = 0
      hasMovedLargeRequest = false
      refreshTable()
      serveUnfinished()
      for index in 0..<count {
        let token = events[index].data.u64
        if token == Self.wakeupToken { readMailbox() } else { serve(token) }
      }
      counters.flush(receivedBytes: &receivedBytes, sentBytes: &sentBytes, requests: &requestCount)
      lastActivity = turnBytes > 0 && turnBytes <= Self.spinLimitBytes ? Clock.now() : 0
    }
    for connection in connections.values { epoll.remove(connection.socket.rawValue) }
    counters.connections.wrappingSubtract(connections.count, ordering: .relaxed)
    connections.removeAll()
    mailbox.withLock { $0.isClosed = true }
    readMailbox()
  }

  private var receivedBytes = 0
  private var sentBytes = 0
  private var requestCount = 0

  func countReceived(_ count: Int) {
    receivedBytes += count
    turnBytes += count
  }

  func countSent(_ count: Int) {
    sentBytes += count
    turnBytes += count
  }

  func countRequest() { requestCount += 1 }

  /// Part of a large request moved.
  func noteLargeRequest() { hasMovedLargeRequest = true }

  /// Counts and logs a refused request.
  func countRejection(_ header: TCPWire.Header, _ verdict: RangeTable.Verdict, _ peer: String) {
    counters.rejections.wrappingAdd(1, ordering: .relaxed)
    Log.warning(
      "tcp peer \(peer): refused \(header.opcode) of \(header.size) bytes at "
        + "0x\(String(header.address, radix: 16)): "
        + (verdict == .accessDenied
          ? "the buffer does not grant this" : "not inside one registered buffer"),
      about: Log.host(of: peer))
  }

  @inline(__always)
  func check(_ header: TCPWire.Header) -> RangeTable.Verdict {
    table.check(header.address, header.size, header.opcode.requiredAccess)
  }

  private func refreshTable() {
    // The version is read first: a change between the two reads only costs one more refresh.
    let version = buffers.version
    if version == tableVersion { return }
    table = buffers.snapshot
    tableVersion = version
  }

  private func readMailbox() {
    wakeup.clear()
    let messages = mailbox.withLock { mailbox in
      defer { mailbox.messages = [] }
      return mailbox.messages
    }
    for message in messages {
      switch message {
      case .adopt(let descriptor, let peer):
        let socket = Socket(owning: FileDescriptor(owning: descriptor))
        if !isStopping { add(socket, peer: peer) }
      case .revoke(let ranges, let acknowledgment):
        refreshTable()
        for (token, connection) in connections where connection.touches(ranges) {
          Log.info(
            "tcp peer \(connection.peer): its buffer was unregistered in mid-request",
            about: Log.host(of: connection.peer))
          close(token)
        }
        acknowledgment.arrive()
      case .stop: isStopping = true
      }
    }
  }

  private func add(_ socket: consuming Socket, peer: String) {
    let token = nextToken
    nextToken += 1
    let connection = TCPServerConnection(socket: socket, peer: peer)
    do throws(Errno) {
      try epoll.add(connection.socket.rawValue, events: connection.interest, token: token)
    } catch {
      Log.warning(
        "tcp peer \(peer): watching the connection: \(error)", about: Log.host(of: peer))
      return
    }
    connections[token] = connection
    counters.connections.wrappingAdd(1, ordering: .relaxed)
  }

  private func close(_ token: UInt64) {
    guard let connection = connections.removeValue(forKey: token) else { return }
    epoll.remove(connection.socket.rawValue)
    drainingTokens.remove(token)
    counters.connections.wrappingSubtract(1, ordering: .relaxed)
  }

  private func serveUnfinished() {
    let tokens = unfinishedTokens
    unfinishedTokens.removeAll(keepingCapacity: true)
    for token in tokens { serve(token) }
  }

  private func serve(_ token: UInt64) {
    guard let connection = connections[token] else { return }
    let before = connection.interest
    switch connection.serve(self) {
    case .close: return close(token)
    case .again: unfinishedTokens.append(token)
    case .keep: break
    }
    if connection.drainDeadline != nil { drainingTokens.insert(token) }
    if connection.interest != before {
      try? epoll.modify(connection.socket.rawValue, events: connection.interest, token: token)
    }
  }

  private func drainTimeout() -> Int32 { drainingTokens.isEmpty ? -1 : 100 }

  private func expireDrains() {
    if drainingTokens.isEmpty { return }
    let now = Clock.now()
    for token in drainingTokens where connections[token]?.drainDeadline ?? 0 <= now { close(token) }
  }

  nonisolated(unsafe) static let okFrame = frame(TCPWire.statusOK)
  nonisolated(unsafe) static let rejectedFrame = frame(TCPWire.statusRejected)

  private static func frame(_ word: UInt64) -> UnsafeRawPointer {
    let bytes = UnsafeMutableRawPointer.allocate(byteCount: TCPWire.statusBytes, alignment: 8)
    bytes.storeBytes(of: word.littleEndian, as: UInt64.self)
    return UnsafeRawPointer(bytes)
  }
}

/// Totals of an engine's TCP transport.
package final class TCPCounters: Sendable {
  package let connections = Atomic<Int>(0)
  package let rejections = Atomic<UInt64>(0)
  package let servedRequests = Atomic<UInt64>(0)
  package let servedReceivedBytes = Atomic<UInt64>(0)
  package let servedSentBytes = Atomic<UInt64>(0)
  package let clientConnections = Atomic<Int>(0)
  package let clientConnectFailures = Atomic<UInt64>(0)
  package let clientDisconnects = Atomic<UInt64>(0)
  package let retries = Atomic<UInt64>(0)
  /// Connections given up with unanswered writes, which the peer has not closed yet.
  package let fences = Atomic<Int>(0)
  package let readBytes = Atomic<UInt64>(0)
  package let writtenBytes = Atomic<UInt64>(0)
  package let completedSlices = Atomic<UInt64>(0)
  package let failedSlices = Atomic<UInt64>(0)

  package init() {}

  fileprivate func flush(
    receivedBytes: inout Int, sentBytes: inout Int, requests: inout Int
  ) {
    servedReceivedBytes.wrappingAdd(UInt64(receivedBytes), ordering: .relaxed)
    servedSentBytes.wrappingAdd(UInt64(sentBytes), ordering: .relaxed)
    servedRequests.wrappingAdd(UInt64(requests), ordering: .relaxed)
    receivedBytes = 0
    sentBytes = 0
    requests = 0
  }
}
