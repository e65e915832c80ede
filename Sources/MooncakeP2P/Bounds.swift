import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// The deadline, cancellation and progress of one running operation. Used by its caller's thread.
package final class Bounds {
  package let deadline: Deadline
  private let operation: StoreOperation
  private let what: String
  /// Whether the store that runs the operation is closing; the descriptor is readable by then.
  private let isClosed: () -> Bool
  private let closing: Int32
  /// Waits on both descriptors, when there are two.
  private let ends: Ends?
  private var nextReport: UInt64 = 0
  /// Whether the progress callback has ended it.
  private var isGivenUp = false
  /// The progress reported last.
  private var told: StoreProgress?
  /// Deadline for undoing an operation that is over.
  private var lastEnd: Deadline?
  private static let reportNanoseconds: UInt64 = 100_000_000

  /// `what` begins error messages. An operation without a timeout gets the default, 0 meaning none.
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

  /// Becomes readable when the operation is canceled; -1 if it cannot be.
  private var canceled: Int32 { operation.cancellation?.event.descriptor.rawValue ?? -1 }

  /// Becomes readable when the operation is to end, because it was canceled or the store closes; -1
  /// if nothing can end it. Do not keep the number beyond the operation: it may be reused for
  /// another file.
  package var cancellation: Int32 {
    if let ends { return ends.epoll.rawValue }
    // If there is no descriptor for both, a store that closes waits for such a call's deadline.
    return operation.cancellation == nil ? closing : canceled
  }

  /// A call that may take as long as the operation.
  private var longCall: Call { Call(until: deadline, cancellation: cancellation) }

  /// A call to the metadata service within these bounds, ten seconds at most.
  package var call: Call { longCall.within(milliseconds: 10_000) }

  /// A call that can just as well be repeated later: two seconds at most.
  package var shortCall: Call { longCall.within(milliseconds: 2000) }

  /// A call that undoes or ends something: three seconds at most, within what is left of the
  /// operation, but always long enough for one answer from a healthy service. Each step makes a new
  /// one, so that cleaning up after a canceled operation is not canceled too, and still ends soon.
  package var lastCall: Call {
    if isOver || isClosed() {
      let end = lastEnd ?? .after(milliseconds: Self.lastMilliseconds)
      lastEnd = end
      return Call(until: end)
    }
    let end = max(deadline, .after(milliseconds: Self.lastMilliseconds))
    return Call(until: min(end, .after(milliseconds: 3000)), cancellation: cancellation)
  }
  private static let lastMilliseconds: UInt64 = 50

  /// A wait for peers that are copying memory which is being withdrawn: as long as the operation
  /// may take, at most `limit`, but always a moment.
  package func release(withinMilliseconds limit: UInt64) -> Call {
    let moment = Deadline.after(milliseconds: Self.momentMilliseconds)
    if isOver || isClosed() { return Call(until: max(moment, lastCall.deadline)) }
    return Call(
      until: max(moment, min(deadline, .after(milliseconds: limit))), cancellation: cancellation)
  }
  /// Longer than a copy that makes progress takes.
  package static let momentMilliseconds: UInt64 = 15

  package var isCanceled: Bool { Waiting.isReadable(canceled) }

  package var isOver: Bool { isGivenUp || deadline.hasPassed || isCanceled }

  /// Throws once the operation is to end.
  package func check(_ phase: String) throws(MooncakeError) {
    if isCanceled { throw MooncakeError(.canceled, "\(what): canceled (\(phase))") }
    if isClosed() { throw MooncakeError(.canceled, "\(what): the store was closed (\(phase))") }
    if deadline.hasPassed {
      throw MooncakeError(.timeout, "\(what): the deadline passed (\(phase))")
    }
  }

  /// Reports progress to the caller: a new phase at once, otherwise only now and then. Throws if
  /// the caller cancels.
  package func report(
    _ phase: StoreProgress.Phase, isLast: Bool = false,
    _ progress: @autoclosure () -> StoreProgress
  ) throws(MooncakeError) {
    guard let body = operation.progress else { return }
    let now = Clock.now()
    if now < nextReport && phase == told?.phase && !isLast { return }
    nextReport = now &+ Self.reportNanoseconds
    let progress = progress()
    told = progress
    if !body(progress) {
      isGivenUp = true
      throw MooncakeError(.canceled, "\(what): canceled by the progress callback")
    }
  }

  /// Repeats the last report during a wait in which nothing changes.
  package func reportAgain() throws(MooncakeError) {
    let last = told ?? StoreProgress(.locating)
    try report(last.phase, last)
  }

  /// Sleeps until the descriptor is readable or it is time to check whether to go on.
  package func sleep(orReadable descriptor: Int32, until end: Deadline = .never) {
    var items = [
      pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0),
      pollfd(fd: cancellation, events: Int16(POLLIN), revents: 0),
    ]
    let tick = min(min(deadline, end), .after(milliseconds: 100))
    // An interruption just counts as a tick.
    _ = poll(&items, 2, tick.remainingMilliseconds)
  }

  /// Runs blocking code on a worker and waits for it as `wait` does.
  package func run<Value: Sendable>(
    on workers: WorkerPool, _ phase: String,
    _ body: @escaping @Sendable () throws(MooncakeError) -> Value
  ) throws(MooncakeError) -> Value {
    try wait(phase) { completion in
      let isAccepted = workers.run {
        do throws(MooncakeError) {
          completion(.success(try body()))
        } catch {
          completion(.failure(error))
        }
      }
      if !isAccepted {
        completion(.failure(MooncakeError(.canceled, "\(what): the store was closed (\(phase))")))
      }
    }
  }

  /// Waits for what `start` begins until it calls back or the operation is over. What is left
  /// behind then must end by itself and not touch the caller's memory; `abandon` gets a value that
  /// arrives too late.
  package func wait<Value: Sendable>(
    _ phase: String, abandon: @escaping @Sendable (Value) -> Void = { _ in },
    _ start: (@escaping StoreService.Completion<Value>) -> Void
  ) throws(MooncakeError) -> Value {
    let pending: PendingResult<Value>
    do throws(Errno) { pending = try PendingResult(abandon) } catch {
      throw MooncakeError(.system, "\(what): making an event descriptor: \(error)")
    }
    start { pending.end($0) }
    while true {
      if let result = pending.result { return try result.get() }
      do throws(MooncakeError) {
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

/// Becomes readable when an operation must end early: it was canceled, or its store closes.
private final class Ends: Sendable {
  let epoll: Epoll
  /// Keeps the descriptor open while it is polled.
  private let cancellation: Cancellation

  init(_ cancellation: Cancellation, _ closing: Int32) throws(Errno) {
    self.cancellation = cancellation
    epoll = try Epoll()
    try epoll.add(cancellation.event.descriptor.rawValue, events: Epoll.readable, token: 0)
    try epoll.add(closing, events: Epoll.readable, token: 1)
  }
}

/// The result of work done elsewhere for a waiting caller.
private final class PendingResult<Result: Sendable>: Sendable {
  let event: EventFD
  private let abandon: @Sendable (Result) -> Void

  private struct State {
    var outcome: Swift.Result<Result, MooncakeError>?
    var isLeft = false
  }
  private let state = Lock(State())

  init(_ abandon: @escaping @Sendable (Result) -> Void) throws(Errno) {
    self.abandon = abandon
    event = try EventFD()
  }

  var result: Swift.Result<Result, MooncakeError>? { state.withLock { $0.outcome } }

  func end(_ result: Swift.Result<Result, MooncakeError>) {
    let isLeft = state.withLock { state in
      state.outcome = result
      return state.isLeft
    }
    if isLeft, case .success(let value) = result { abandon(value) }
    event.signal()
  }

  /// The caller has stopped waiting for the result.
  func leave() {
    let outcome = state.withLock { state in
      state.isLeft = true
      return state.outcome
    }
    if case .success(let value) = outcome { abandon(value) }
  }
}
