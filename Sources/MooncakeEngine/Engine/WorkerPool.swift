import Glibc
import MooncakeSystem
import Synchronization

/// Threads for what may block: asking peers, delivering notifications, running callbacks. Started
/// when there is work and ended when there has been none for a while.
package final class WorkerPool: Sendable {
  package typealias Job = @Sendable () -> Void

  private struct State: Sendable {
    var jobs: [Job] = []
    var threadCount = 0
    var threads: Set<pthread_t> = []
    var idleCount = 0
    var isStopping = false
  }

  private let state = Lock(State())
  private let doorbell = Futex()
  private let departures = Futex()
  private let name: String
  private let threadLimit: Int
  private static let idleMilliseconds: UInt64 = 2_000

  /// With a limit of 1, jobs run one after the other in order.
  package init(name: String, threadLimit: Int) {
    self.name = name
    self.threadLimit = threadLimit
  }

  /// Runs a job soon; returns false, and does not run it, once the pool is stopping.
  package func run(_ job: @escaping Job) -> Bool {
    enum Decision { case refuse, wake, start }
    let decision: Decision = state.withLock { state in
      if state.isStopping { return .refuse }
      state.jobs.append(job)
      if state.idleCount >= state.jobs.count || state.threadCount == threadLimit { return .wake }
      state.threadCount += 1
      return .start
    }
    switch decision {
    case .refuse: return false
    case .wake: wake()
    case .start:
      // The pool must outlive its threads: `stop` waits for them.
      do throws(Errno) {
        try WorkerThread.startDetached(name: name) { [self] in work() }
      } catch {
        Log.error("starting a worker thread: \(error)")
        return withdraw()
      }
    }
    return true
  }

  /// Refuses further jobs and waits until the accepted ones have run. Called from a job, when the
  /// pool's user ends there, it waits for the other threads only.
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

  /// A thread could not be started: the job stays if another thread will get to it.
  private func withdraw() -> Bool {
    state.withLock { state in
      state.threadCount -= 1
      if state.threadCount > 0 { return true }
      _ = state.jobs.popLast()
      return false
    }
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
      case leave, wait
    }
    var deadline = Deadline.after(milliseconds: Self.idleMilliseconds)
    var isCountedIdle = false
    while true {
      let bell = doorbell.value
      let step: Step = state.withLock { state in
        if isCountedIdle { state.idleCount -= 1 }
        isCountedIdle = false
        if !state.jobs.isEmpty { return .job(state.jobs.removeFirst()) }
        if state.isStopping || deadline.hasPassed {
          state.threadCount -= 1
          state.threads.remove(pthread_self())
          return .leave
        }
        state.idleCount += 1
        isCountedIdle = true
        return .wait
      }
      switch step {
      case .job(let job): return job
      case .leave: return nil
      case .wait: doorbell.wait(while: bell, until: deadline)
      }
      deadline = min(deadline, .after(milliseconds: Self.idleMilliseconds))
    }
  }
}
