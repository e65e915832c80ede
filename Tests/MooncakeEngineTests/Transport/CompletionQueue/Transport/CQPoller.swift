import Glibc
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Polls the completion queue and drives the endpoints: one thread at a time, its own or one that
/// waits for its batch. A driver without work spins for a while, then sleeps until an event.
final class CQPoller: Driver, @unchecked Sendable {
  static let isExclusive = true

  // Unchecked: `active`, `owners` belong to whoever holds the token; the rest is synchronized or
  // set before the poller is shared.
  private let completions: CompletionQueue
  private let spinNanoseconds: UInt64
  private let token = Atomic<Bool>(false)
  private let bell = Futex()
  private let sleepers = Atomic<Int>(0)
  private let ready = Lock<[CQEndpoint]>([])
  private let readyCount = Atomic<Int>(0)
  private let activeCount = Atomic<Int>(0)
  private let sweepRequested = Atomic<Bool>(false)
  private let isStopping = Atomic<Bool>(false)
  private var active: [CQEndpoint] = []
  private var owners: [ObjectIdentifier: CQEndpoint] = [:]
  private var thread: WorkerThread?
  private(set) var driverBit = 0

  init(_ completions: CompletionQueue, spinNanoseconds: UInt64) {
    self.completions = completions
    self.spinNanoseconds = spinNanoseconds
  }

  func start(driverBit: Int) throws(Errno) {
    self.driverBit = driverBit
    completions.setListener { [weak self] in self?.ring() }
    thread = try WorkerThread.start(name: "mc-cq-poll") { [unowned self] in run() }
  }

  /// Ends every slice as canceled. `stopDevices` flushes what is posted.
  func stop(_ stopDevices: () -> Void) {
    isStopping.store(true, ordering: .sequentiallyConsistent)
    ring()
    thread?.join()
    thread = nil
    while !tryTake() { sched_yield() }
    stopDevices()
    takeReady()
    for endpoint in active { endpoint.shutDown() }
    active = []
    owners = [:]
    // What was flushed belongs to nobody any more, and each completion holds its device.
    _ = completions.takeAll()
    giveBack()
  }

  // MARK: Any thread

  func schedule(_ endpoint: CQEndpoint) {
    // Nothing is submitted any more; what retires now has no slices.
    if isStopping.load(ordering: .sequentiallyConsistent) { return }
    if endpoint.isScheduled.exchange(true, ordering: .sequentiallyConsistent) { return }
    ready.withLock {
      $0.append(endpoint)
      readyCount.store($0.count, ordering: .sequentiallyConsistent)
    }
  }

  func kick() { ring() }
  func nudge() { ring() }

  func requestSweep() {
    sweepRequested.store(true, ordering: .sequentiallyConsistent)
    ring()
  }

  private func ring() {
    bell.increment()
    if sleepers.load(ordering: .sequentiallyConsistent) > 0 { bell.wakeAll() }
  }

  private var hasWork: Bool {
    readyCount.load(ordering: .sequentiallyConsistent) > 0 || !completions.isEmpty
      || activeCount.load(ordering: .sequentiallyConsistent) > 0
      || sweepRequested.load(ordering: .sequentiallyConsistent)
  }

  private func tryTake() -> Bool {
    !token.load(ordering: .relaxed) && !token.exchange(true, ordering: .sequentiallyConsistent)
  }

  private func giveBack() { token.store(false, ordering: .sequentiallyConsistent) }

  private func sleep(while seen: UInt32, until deadline: Deadline, unless isAwake: () -> Bool) {
    sleepers.wrappingAdd(1, ordering: .sequentiallyConsistent)
    defer { sleepers.wrappingSubtract(1, ordering: .sequentiallyConsistent) }
    if isAwake() || isStopping.load(ordering: .sequentiallyConsistent) { return }
    bell.wait(while: seen, until: deadline)
  }

  func pollIfFree() -> Bool {
    guard hasWork, tryTake() else { return false }
    _ = turn(Clock.now())
    giveBack()
    if hasWork { ring() }
    return true
  }

  func driveIfFree(until deadline: Deadline, isDone: () -> Bool) -> Bool {
    guard tryTake() else { return false }
    drive(until: deadline, isDone: isDone)
    giveBack()
    if hasWork { ring() }
    return true
  }

  // MARK: The driver

  private func run() {
    while !isStopping.load(ordering: .sequentiallyConsistent) {
      let seen = bell.value
      if hasWork, tryTake() {
        drive(until: .never) { [unowned self] in !hasWork }
        giveBack()
      } else {
        sleep(while: seen, until: .never) {
          hasWork && !token.load(ordering: .sequentiallyConsistent)
        }
      }
    }
  }

  private func drive(until deadline: Deadline, isDone: () -> Bool) {
    var quietSince: UInt64 = 0
    while !isDone(), !isStopping.load(ordering: .relaxed) {
      let seen = bell.value
      let now = Clock.now()
      if now >= deadline.nanoseconds { return }
      if turn(now) {
        quietSince = 0
      } else if quietSince == 0 {
        quietSince = now
      } else if now - quietSince < spinNanoseconds {
        relaxProcessor()
      } else {
        var wake = deadline.nanoseconds
        for endpoint in active { wake = min(wake, endpoint.nextTimer(now)) }
        sleep(while: seen, until: Deadline(nanoseconds: wake), unless: isDone)
        quietSince = 0
      }
    }
  }

  /// Returns whether anything was done.
  private func turn(_ now: UInt64) -> Bool {
    var isBusy = takeReady()
    for completion in completions.takeAll() {
      isBusy = true
      owners[ObjectIdentifier(completion.pair)]?.complete(completion, now)
    }
    let sweeps = sweepRequested.exchange(false, ordering: .sequentiallyConsistent)
    for index in active.indices {
      if sweeps || now >= active[index].bound { active[index].sweep(now) }
      if active[index].progress(now) { isBusy = true }
    }
    active.removeAll { $0.leavesIfIdle() }
    activeCount.store(active.count, ordering: .sequentiallyConsistent)
    return isBusy
  }

  @discardableResult
  private func takeReady() -> Bool {
    if readyCount.load(ordering: .sequentiallyConsistent) == 0 { return false }
    let endpoints = ready.withLock { ready in
      defer { ready = [] }
      readyCount.store(0, ordering: .sequentiallyConsistent)
      return ready
    }
    for endpoint in endpoints {
      endpoint.isScheduled.store(false, ordering: .sequentiallyConsistent)
      endpoint.takeInbox()
      if !endpoint.isActive {
        endpoint.isActive = true
        active.append(endpoint)
      }
    }
    return true
  }

  func watch(_ pair: FakeQueuePair, for endpoint: CQEndpoint) {
    owners[ObjectIdentifier(pair)] = endpoint
  }

  func forget(_ pair: FakeQueuePair) { owners[ObjectIdentifier(pair)] = nil }
}
