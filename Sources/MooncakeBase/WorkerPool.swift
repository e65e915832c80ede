import Glibc
import MooncakeSystem
import Synchronization

/// Threads for work that may block: asking peers, delivering notifications, running callbacks.
/// Started on demand and ended when idle for a while.
package final class WorkerPool: Sendable {
  package typealias Job = @Sendable () -> Void

  private struct State: Sendable {
    var jobs: [Job] = []
    var threadCount = 0
    var threads: Set<pthread_t> = []
    var idleCount = 0
    /// Whether one thread is kept until the pool stops.
    var isReserved = false
    var isStopping = false
  }

  private let state = Lock(State())
  private let doorbell = Futex()
  private let departures = Futex()
  private let name: String
  private let threadLimit: Int
  private static let idleMilliseconds: UInt64 = 2_000

  /// With a limit of 1, jobs run one after another in order.
  package init(name: String, threadLimit: Int) {
    self.name = name
    self.threadLimit = threadLimit
  }

  /// Keeps one thread from now on, so that `run` cannot fail before the pool stops.
  package func reserve() throws(MooncakeError) {
    let failure: Errno? = state.withLock { state in
      if state.isReserved || state.isStopping { return nil }
      if state.threadCount == 0, let failure = startThread(&state) { return failure }
      state.isReserved = true
      return nil
    }
    if let failure {
      throw MooncakeError(.system, "\(describeFailure(failure))")
    }
  }

  /// Runs a job soon. Returns false without running it if the pool is stopping, or if it has no
  /// thread and cannot start one.
  package func run(_ job: @escaping Job) -> Bool {
    var failure: Errno?
    let isAccepted: Bool = state.withLock { state in
      if state.isStopping { return false }
      if state.idleCount <= state.jobs.count && state.threadCount < threadLimit {
        failure = startThread(&state)
      }
      // The existing threads will get to it.
      if state.threadCount > 0 { state.jobs.append(job) }
      return state.threadCount > 0
    }
    if isAccepted { wake() }
    if let failure { Log.error(describeFailure(failure)) }
    return isAccepted
  }

  /// Starts a thread; nil on success. Called under the lock, so that every counted thread really
  /// runs.
  private func startThread(_ state: inout State) -> Errno? {
    do throws(Errno) {
      // The pool must outlive its threads: `stop` waits for them.
      try WorkerThread.startDetached(name: name) { [self] in work() }
      state.threadCount += 1
      return nil
    } catch {
      return error
    }
  }

  private func describeFailure(_ error: Errno) -> String {
    "starting the thread \(name): \(error): raise the limit of threads (ulimit -u, or pids.max of "
      + "the control group)"
  }

  /// Refuses further jobs and waits until the accepted ones have run. Called from a job of the
  /// pool, it waits only for the other threads.
  package func stop() {
    let own = state.withLock { state in
      state.isStopping = true
      return state.threads.contains(pthread_self()) ? 1 : 0
    }
    wake()
    while true {
      let bell = departures.value
      if state.withLock({ $0.threadCount }) <= own { return }
      departures.wait(while: bell, until: .never)
    }
  }

  private func wake() {
    doorbell.increment()
    doorbell.wakeAll()
  }

  private func work() {
    state.withLock { _ = $0.threads.insert(pthread_self()) }
    while let job = nextJob() { job() }
    departures.increment()
    departures.wakeAll()
  }

  private func nextJob() -> Job? {
    enum Step {
      case job(Job)
      case leave
      case wait(until: Deadline)
    }
    let deadline = Deadline.after(milliseconds: Self.idleMilliseconds)
    var isCountedIdle = false
    while true {
      let bell = doorbell.value
      let step: Step = state.withLock { state in
        if isCountedIdle { state.idleCount -= 1 }
        isCountedIdle = false
        if !state.jobs.isEmpty { return .job(state.jobs.removeFirst()) }
        let stays = state.isReserved && state.threadCount == 1
        if state.isStopping || (deadline.hasPassed && !stays) {
          state.threadCount -= 1
          state.threads.remove(pthread_self())
          return .leave
        }
        state.idleCount += 1
        isCountedIdle = true
        return .wait(until: stays ? .never : deadline)
      }
      switch step {
      case .job(let job): return job
      case .leave: return nil
      case .wait(let end): doorbell.wait(while: bell, until: end)
      }
    }
  }
}
