import Glibc
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// The deadline, cancellation and progress of one running operation. Used by its caller's thread.
package final class Bounds {
  package let deadline: Deadline
  private let operation: StoreOperation
  private let what: String
  /// Whether the store that runs it closes; the descriptor is readable by then.
  private let isClosed: () -> Bool
  private let closing: Int32
  /// Both descriptors as one, where there are two.
  private let ends: Ends?
  private var nextReport: UInt64 = 0
  /// Whether the progress callback has ended it.
  private var isGivenUp = false
  /// What was told last.
  private var told: StoreProgress?
  /// When what undoes an operation that is over must end.
  private var lastEnd: Deadline?
  private static let reportNanoseconds: UInt64 = 100_000_000

  /// `what` begins the errors; an operation without a timeout gets the default, 0 for none.
  package init(
    _ operation: StoreOperation, _ what: String, defaultMilliseconds: UInt64,
    closing: Int32 = -1, isClosed: @escaping () -> Bool
  ) {
    self.operation = operation
    self.what = what
    self.isClosed = isClosed
    self.closing = closing
    ends = operation.cancellation.flatMap { closing < 0 ? nil : try? Ends($0, closing) }
    let milliseconds =
      operation.timeoutMilliseconds == 0 ? defaultMilliseconds : operation.timeoutMilliseconds
    deadline = milliseconds == 0 ? .never : .after(milliseconds: milliseconds)
  }

  /// Readable once the operation was canceled; -1 if it cannot be.
  private var canceled: Int32 { operation.cancellation?.event.descriptor.rawValue ?? -1 }

  /// Becomes readable when the operation is to end, canceled or with its store; -1 if it cannot be
  /// ended. Whoever keeps the number beyond the operation may mean another file.
  package var cancellation: Int32 {
    if let ends { return ends.epoll.rawValue }
    // Without a descriptor for both a store that closes waits for the deadline of such a call.
    return operation.cancellation == nil ? closing : canceled
  }

  /// A call to the metadata service within these bounds, ten seconds at most.
  package var call: MetadataCall {
    MetadataCall(
      until: min(deadline, .after(milliseconds: 10_000)), cancellation: cancellation)
  }

  /// A call that may as well be repeated later: two seconds at most.
  package var shortCall: MetadataCall {
    MetadataCall(until: min(deadline, .after(milliseconds: 2000)), cancellation: cancellation)
  }

  /// A call that undoes or ends something: three seconds at most, and what is left of the
  /// operation, but so much that a service that answers can be asked. Made anew for each step: what
  /// comes once the operation is over is not canceled too, but all of that has little time.
  package var lastCall: MetadataCall {
    if isOver || isClosed() {
      let end = lastEnd ?? .after(milliseconds: Self.lastMilliseconds)
      lastEnd = end
      return MetadataCall(until: end)
    }
    let end = max(deadline, .after(milliseconds: Self.lastMilliseconds))
    return MetadataCall(until: min(end, .after(milliseconds: 3000)), cancellation: cancellation)
  }
  private static let lastMilliseconds: UInt64 = 50

  /// A wait for peers that are in the middle of a copy of memory which is withdrawn: as long as the
  /// operation may go on, at most so long, and a moment in any case.
  package func release(withinMilliseconds limit: UInt64) -> MetadataCall {
    let moment = Deadline.after(milliseconds: Self.momentMilliseconds)
    if isOver || isClosed() { return MetadataCall(until: max(moment, lastCall.deadline)) }
    return MetadataCall(
      until: max(moment, min(deadline, .after(milliseconds: limit))), cancellation: cancellation)
  }
  /// A copy that goes on ends in less.
  package static let momentMilliseconds: UInt64 = 15

  package var isCanceled: Bool { Waiting.isReadable(canceled) }

  package var isOver: Bool { isGivenUp || deadline.hasPassed || isCanceled }

  /// Throws once the operation is to end.
  package func check(_ phase: String) throws(EngineError) {
    if isCanceled { throw EngineError(.canceled, "\(what): canceled (\(phase))") }
    if isClosed() { throw EngineError(.canceled, "\(what): the store was closed (\(phase))") }
    if deadline.hasPassed {
      throw EngineError(.timeout, "\(what): the deadline passed (\(phase))")
    }
  }

  /// Tells the caller how far it is: each new phase at once, else not too often; throws if it does
  /// not want to go on.
  package func report(
    _ phase: StoreProgress.Phase, isLast: Bool = false,
    _ progress: @autoclosure () -> StoreProgress
  ) throws(EngineError) {
    guard let body = operation.progress else { return }
    let now = Clock.now()
    if now < nextReport && phase == told?.phase && !isLast { return }
    nextReport = now &+ Self.reportNanoseconds
    let progress = progress()
    told = progress
    if !body(progress) {
      isGivenUp = true
      throw EngineError(.canceled, "\(what): canceled by the progress callback")
    }
  }

  /// Tells again what was told last, in a wait during which nothing changes.
  package func reportAgain() throws(EngineError) {
    let last = told ?? StoreProgress(.locating)
    try report(last.phase, last)
  }

  /// Sleeps until the descriptor is readable, or until it is time to look whether to go on.
  package func sleep(orReadable descriptor: Int32, until end: Deadline = .never) {
    var items = [
      pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0),
      pollfd(fd: cancellation, events: Int16(POLLIN), revents: 0),
    ]
    let tick = min(min(deadline, end), .after(milliseconds: 100))
    // An interruption is as good as a tick.
    _ = poll(&items, 2, tick.remainingMilliseconds)
  }

  /// Runs what blocks on a worker, and waits for it likewise.
  package func run<Value: Sendable>(
    on workers: WorkerPool, _ phase: String,
    _ body: @escaping @Sendable () throws(EngineError) -> Value
  ) throws(EngineError) -> Value {
    try wait(phase) { completion in
      let isAccepted = workers.run {
        do throws(EngineError) {
          completion(.success(try body()))
        } catch {
          completion(.failure(error))
        }
      }
      if !isAccepted {
        completion(.failure(EngineError(.canceled, "\(what): the store was closed (\(phase))")))
      }
    }
  }

  /// Waits for what `start` begins and what calls back, as long as the operation may go on. What is
  /// left behind then must end by itself and touch nothing of the caller's; `abandon` gets a value
  /// that comes too late for it.
  package func wait<Value: Sendable>(
    _ phase: String, abandon: @escaping @Sendable (Value) -> Void = { _ in },
    _ start: (@escaping StoreService.Completion<Value>) -> Void
  ) throws(EngineError) -> Value {
    let pending: PendingResult<Value>
    do throws(Errno) { pending = try PendingResult(abandon) } catch {
      throw EngineError(.system, "\(what): making an event descriptor: \(error)")
    }
    start { pending.end($0) }
    while true {
      if let result = pending.result { return try result.get() }
      do throws(EngineError) {
        try check(phase)
        try reportAgain()
      } catch {
        pending.leave()
        throw error
      }
      sleep(orReadable: pending.event.descriptor.rawValue)
    }
  }
}

/// What ends an operation early: its cancellation, or that its store closes.
private final class Ends: Sendable {
  let epoll: Epoll
  /// Kept as long as its descriptor is waited for.
  private let cancellation: Cancellation

  init(_ cancellation: Cancellation, _ closing: Int32) throws(Errno) {
    self.cancellation = cancellation
    epoll = try Epoll()
    try epoll.add(cancellation.event.descriptor.rawValue, events: Epoll.readable, token: 0)
    try epoll.add(closing, events: Epoll.readable, token: 1)
  }
}

/// The result of what is done elsewhere for a waiting caller.
private final class PendingResult<Result: Sendable>: Sendable {
  let event: EventFD
  private let abandon: @Sendable (Result) -> Void

  private struct State {
    var outcome: Swift.Result<Result, EngineError>?
    var isLeft = false
  }
  private let state = Lock(State())

  init(_ abandon: @escaping @Sendable (Result) -> Void) throws(Errno) {
    self.abandon = abandon
    event = try EventFD()
  }

  var result: Swift.Result<Result, EngineError>? { state.withLock { $0.outcome } }

  func end(_ result: Swift.Result<Result, EngineError>) {
    let isLeft = state.withLock { state in
      state.outcome = result
      return state.isLeft
    }
    if isLeft, case .success(let value) = result { abandon(value) }
    event.signal()
  }

  /// Nobody takes the result any more.
  func leave() {
    let outcome = state.withLock { state in
      state.isLeft = true
      return state.outcome
    }
    if case .success(let value) = outcome { abandon(value) }
  }
}
