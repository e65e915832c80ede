import MooncakeBase
import MooncakeSystem
import Synchronization

/// The event loop of `RPCCaller`; everything but `submit`, `requestStop` and `pendingCount` belongs
/// to its thread.
final class RPCCallerLoop: @unchecked Sendable {
  // Unchecked: one thread runs the loop; members that others use are synchronized.
  /// An idle connection, and until when it is kept.
  private final class Kept {
    var socket: Socket?
    let address: SocketAddress
    let end: Deadline

    init(_ socket: consuming Socket, _ address: SocketAddress, _ end: Deadline) {
      self.socket = consume socket
      self.address = address
      self.end = end
    }
  }

  private let loop: RPCEventLoop
  /// nil once the loop takes no more questions.
  private let mailbox = Lock<[RPCQuestion]?>([])
  /// Work to run at a certain time.
  private struct Timer {
    let end: Deadline
    let body: @Sendable () -> Void
  }
  private let timers = Lock<[Timer]>([])
  private let pending = Atomic<Int>(0)
  private var questions: [UInt64: RPCQuestion] = [:]
  private var kept: [UInt64: Kept] = [:]
  private var nextToken = RPCEventLoop.wakeToken + 1

  /// Questions at a time; further ones fail at once.
  private static let questionLimit = 4096
  private static let keptLimit = 64
  /// Shorter than peers keep connections (`RPCServer.Limits`), so that few are found closed.
  private static let keptMilliseconds: UInt64 = 3000

  init() throws(Errno) { loop = try RPCEventLoop() }

  /// Questions whose completion has not been called.
  var pendingCount: Int { pending.load(ordering: .acquiring) }

  func submit(_ question: RPCQuestion) throws(MooncakeError) {
    if pendingCount >= Self.questionLimit {
      throw MooncakeError(
        .full, "peer \(question.call.peer): \(Self.questionLimit) questions are under way already")
    }
    pending.wrappingAdd(1, ordering: .acquiringAndReleasing)
    let isTaken = mailbox.withLock { mailbox in
      mailbox?.append(question)
      return mailbox != nil
    }
    loop.wake()
    if !isTaken { end(question, .failure(Self.stopped)) }
  }

  func submit(at deadline: Deadline, _ body: @escaping @Sendable () -> Void) {
    timers.withLock { $0.append(Timer(end: deadline, body: body)) }
    loop.wake()
  }

  func requestStop() { loop.requestStop() }

  func run() {
    loop.run(until: nextDeadline, handle, afterEach: expire)
    let late = mailbox.withLock { mailbox in
      defer { mailbox = nil }
      return mailbox ?? []
    }
    for question in late + questions.values { end(question, .failure(Self.stopped)) }
    (questions, kept) = ([:], [:])
  }

  private static var stopped: MooncakeError {
    MooncakeError(.canceled, "asking a peer: the engine was destroyed")
  }

  private func handle(_ token: UInt64, _ scratch: UnsafeMutableRawBufferPointer) {
    if token == RPCEventLoop.wakeToken {
      let new = mailbox.withLock { mailbox in
        defer { if mailbox != nil { mailbox = [] } }
        return mailbox ?? []
      }
      for question in new { begin(question, scratch) }
    } else if let question = questions[token] {
      advance(question, token, scratch)
    } else {
      // The peer has closed a kept connection or sent something unasked.
      kept[token] = nil
    }
  }

  private func begin(_ question: RPCQuestion, _ scratch: UnsafeMutableRawBufferPointer) {
    if let (token, connection) = kept.first(where: { $0.value.address == question.address }),
      let socket = connection.socket.take()
    {
      kept[token] = nil
      question.reuse(socket)
      questions[token] = question
      return advance(question, token, scratch)
    }
    connect(question)
  }

  private func connect(_ question: RPCQuestion) {
    let token = nextToken
    nextToken += 1
    do throws(MooncakeError) {
      try question.connect()
      do throws(Errno) {
        try loop.epoll.add(question.descriptor, events: Epoll.writable, token: token)
      } catch {
        throw question.connectFailure(error)
      }
      questions[token] = question
    } catch {
      end(question, .failure(error))
    }
  }

  private func advance(
    _ question: RPCQuestion, _ token: UInt64, _ scratch: UnsafeMutableRawBufferPointer
  ) {
    switch question.advance(scratch) {
    case .goOn(let events):
      try? loop.epoll.modify(question.descriptor, events: events, token: token)
    case .retry:
      questions[token] = nil
      connect(question)
    case .ended(let result):
      questions[token] = nil
      if case .success = result { keep(question, token) }
      end(question, result)
    }
  }

  /// The connection keeps its token, so that its close shows up as an event.
  private func keep(_ question: RPCQuestion, _ token: UInt64) {
    guard let socket = question.takeSocket() else { return }
    do throws(Errno) {
      try loop.epoll.modify(socket.rawValue, events: Epoll.readable, token: token)
    } catch {
      return
    }
    if kept.count >= Self.keptLimit,
      let oldest = kept.min(by: { $0.value.end < $1.value.end })?.key
    {
      kept[oldest] = nil
    }
    kept[token] = Kept(
      socket, question.address, .after(milliseconds: Self.keptMilliseconds))
  }

  private func end(_ question: RPCQuestion, _ result: Result<String, MooncakeError>) {
    question.finish(result)
    pending.wrappingSubtract(1, ordering: .acquiringAndReleasing)
  }

  private func nextDeadline() -> Deadline {
    var next = Deadline.never
    for question in questions.values { next = min(next, question.end) }
    for connection in kept.values { next = min(next, connection.end) }
    timers.withLock { for timer in $0 { next = min(next, timer.end) } }
    return next
  }

  private func expire() {
    for (token, question) in questions where question.end.hasPassed {
      questions[token] = nil
      end(question, .failure(question.fail(.timedOut)))
    }
    for (token, connection) in kept where connection.end.hasPassed { kept[token] = nil }
    // Read the clock once: a timer that expired between two reads would be skipped.
    let now = Clock.now()
    let due = timers.withLock { timers in
      let due = timers.filter { $0.end.nanoseconds <= now }
      if !due.isEmpty { timers.removeAll { $0.end.nanoseconds <= now } }
      return due
    }
    for timer in due { timer.body() }
  }
}
