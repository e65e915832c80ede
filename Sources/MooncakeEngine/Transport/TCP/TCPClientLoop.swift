import CLinux
import Glibc
import MooncakeSystem
import Synchronization

/// Drives the client connections assigned to it.
///
/// Whoever holds `isDriven` is the driver: the loop's own thread, or a thread that waits for its
/// batch and so saves two wake-ups. Everything below "The driver" belongs to the driver.
package final class TCPClientLoop: @unchecked Sendable {
  // Unchecked: see above; the rest is atomic.
  private let ready = Atomic<UInt>(0)
  private let isDriven = Atomic<Bool>(false)
  /// Someone sleeps in epoll and must be woken through `wakeup`.
  private let isPolling = Atomic<Bool>(false)
  /// How the loop's own thread sleeps on `doorbell`, if it does.
  private let parking = Atomic<UInt8>(Parking.awake)
  private let doorbell = Futex()
  private let lastActivity = Atomic<UInt64>(0)
  private let activeCount = Atomic<Int>(0)
  private let sweepRequested = Atomic<Bool>(false)
  private let isStopping = Atomic<Bool>(false)
  private let wakeup: EventFD
  let epoll: Epoll
  let counters: TCPCounters
  /// Position among the transport's loops, below 64.
  package let index: Int
  private let spinNanoseconds: UInt64
  private var thread: WorkerThread?

  let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: TCPWire.vectorLimit)
  let headers = UnsafeMutableRawPointer.allocate(
    byteCount: TCPWire.vectorLimit * TCPWire.headerBytes, alignment: 64)
  let statuses = UnsafeMutableRawPointer.allocate(
    byteCount: TCPWire.vectorLimit * TCPWire.statusBytes, alignment: 64)
  private let events = UnsafeMutableBufferPointer<epoll_event>.allocate(capacity: 128)
  var active: [TCPEndpoint] = []
  private var watched: [UInt64: TCPEndpoint] = [:]
  /// Connections given up with unanswered writes.
  var fences: [UInt64: TCPFence] = [:]
  var fenceScratch: UnsafeMutableRawPointer?
  /// Those of them that nobody waits for any more. Others have the loop driven; these are looked at
  /// now and then, so that a peer which is away for long keeps no driver from other peers.
  var lateFences = 0 {
    didSet { hasLateFences.store(lateFences > 0, ordering: .relaxed) }
  }
  private let hasLateFences = Atomic<Bool>(false)
  var nextToken: UInt64 = 1
  /// When the present turn began.
  var now: UInt64 = 0
  /// Moved since the driver last waited.
  var burstBytes = 0
  private var completedSlices = 0
  private var readBytes = 0
  private var writtenBytes = 0

  private enum Parking {
    static let awake: UInt8 = 0
    /// Looks for work by itself every `restNanoseconds`.
    static let resting: UInt8 = 1
    /// Until it is woken.
    static let asleep: UInt8 = 2
  }

  /// While callers are active they drive the loop themselves as a rule; its own thread then only
  /// looks now and then whether somebody left work behind, which spares a wake-up a submit.
  private static let restNanoseconds: UInt64 = 500_000
  private static let activeNanoseconds: UInt64 = 10_000_000

  private static let lateFenceNanoseconds: UInt64 = 1_000_000_000

  static let receiveLimitBytes = 1 << 20
  private static let wakeupToken: UInt64 = 0
  /// More bytes than this in a burst is bulk: spinning would only take the processor from the peer.
  private static let spinLimitBytes = 64 << 10
  /// Up to so many busy connections are tried directly while spinning, without asking epoll.
  private static let directLimit = 2

  package init(index: Int, counters: TCPCounters, spinNanoseconds: UInt64) throws(Errno) {
    self.index = index
    self.counters = counters
    self.spinNanoseconds = spinNanoseconds
    wakeup = try EventFD()
    epoll = try Epoll()
    try epoll.add(wakeup.descriptor.rawValue, events: Epoll.readable, token: Self.wakeupToken)
  }

  deinit {
    // Scheduled by other loops after this one had stopped.
    var cursor = ready.load(ordering: .relaxed)
    while let pointer = UnsafeRawPointer(bitPattern: cursor) {
      cursor = Unmanaged<TCPEndpoint>.fromOpaque(pointer).takeRetainedValue().nextReady
    }
    vectors.deallocate()
    headers.deallocate()
    statuses.deallocate()
    events.deallocate()
    fenceScratch?.deallocate()
  }

  package func start(name: String, on processors: ProcessorSet?) throws(Errno) {
    thread = try WorkerThread.start(name: name, on: processors) { [unowned self] in run() }
  }

  /// Ends every slice as canceled, closes the connections and joins the thread.
  package func stop() {
    isStopping.store(true, ordering: .sequentiallyConsistent)
    kick()
    doorbell.increment()
    doorbell.wakeAll()
    thread?.join()
    thread = nil
    // A caller may still drive; it leaves when it sees `isStopping`.
    while !tryAcquire() { sched_yield() }
    takeReady()
    var endpoints: [ObjectIdentifier: TCPEndpoint] = [:]
    for endpoint in active { endpoints[ObjectIdentifier(endpoint)] = endpoint }
    for endpoint in watched.values { endpoints[ObjectIdentifier(endpoint)] = endpoint }
    for endpoint in endpoints.values { endpoint.shutDown() }
    active.removeAll()
    dropFences()
    flushCounters()
    isDriven.store(false, ordering: .sequentiallyConsistent)
  }
}

// MARK: - Any thread

extension TCPClientLoop {
  /// Puts an endpoint on the ready stack unless it is there.
  func schedule(_ endpoint: TCPEndpoint) {
    if endpoint.isScheduled.exchange(true, ordering: .acquiringAndReleasing) { return }
    let pointer = UInt(bitPattern: Unmanaged.passRetained(endpoint).toOpaque())
    var top = ready.load(ordering: .relaxed)
    while true {
      endpoint.nextReady = top
      let (exchanged, current) = ready.weakCompareExchange(
        expected: top, desired: pointer, successOrdering: .sequentiallyConsistent,
        failureOrdering: .relaxed)
      if exchanged { return }
      top = current
    }
  }

  /// Makes sure that somebody looks at the ready stack soon. Sequentially consistent throughout:
  /// either the sleeper sees the stack or we see the sleeper.
  package func kick() {
    if isPolling.exchange(false, ordering: .sequentiallyConsistent) { return wakeup.signal() }
    if isDriven.load(ordering: .sequentiallyConsistent) { return }
    if parking.exchange(Parking.awake, ordering: .sequentiallyConsistent) != Parking.awake {
      doorbell.increment()
      doorbell.wakeAll()
    }
  }

  /// As `kick`, but leaves a resting thread alone: for work that its submitter is about to drive.
  package func nudge() {
    if parking.load(ordering: .sequentiallyConsistent) == Parking.resting,
      !isPolling.load(ordering: .sequentiallyConsistent)
    {
      return
    }
    kick()
  }

  /// Makes the driver look at deadlines, cancellations and retirements now.
  package func requestSweep() {
    sweepRequested.store(true, ordering: .sequentiallyConsistent)
    kick()
  }

  @inline(__always)
  private func tryAcquire() -> Bool {
    if isDriven.load(ordering: .relaxed) { return false }
    return !isDriven.exchange(true, ordering: .sequentiallyConsistent)
  }

  private func release() {
    isDriven.store(false, ordering: .sequentiallyConsistent)
    if hasWork { kick() }
  }

  private var hasWork: Bool {
    ready.load(ordering: .sequentiallyConsistent) != 0
      || activeCount.load(ordering: .sequentiallyConsistent) > 0
      || sweepRequested.load(ordering: .sequentiallyConsistent)
  }

  /// Drives until `isDone`, if nobody else does. Returns whether it did drive.
  package func driveIfFree(until deadline: Deadline, isDone: () -> Bool) -> Bool {
    guard tryAcquire() else { return false }
    drive(until: deadline, isDone: isDone)
    release()
    return true
  }

  /// One turn without waiting, if nobody drives.
  package func pollIfFree() {
    guard hasWork, tryAcquire() else { return }
    let now = Clock.now()
    _ = turn(now)
    lastActivity.store(now, ordering: .relaxed)
    isDriven.store(false, ordering: .sequentiallyConsistent)
    if hasWork { nudge() }
  }
}

// MARK: - The loop's own thread

extension TCPClientLoop {
  private func run() {
    while !isStopping.load(ordering: .sequentiallyConsistent) {
      if hasWork, tryAcquire() {
        drive(until: .never) { [unowned self] in !hasWork }
        isDriven.store(false, ordering: .sequentiallyConsistent)
        continue
      }
      let bell = doorbell.value
      let now = Clock.now()
      let rests = now &- lastActivity.load(ordering: .relaxed) < Self.activeNanoseconds
      parking.store(
        rests ? Parking.resting : Parking.asleep, ordering: .sequentiallyConsistent)
      // Work without a driver must not be slept over.
      if !(hasWork && !isDriven.load(ordering: .sequentiallyConsistent))
        && !isStopping.load(ordering: .sequentiallyConsistent)
      {
        doorbell.wait(while: bell, until: parkingEnd(rests, now))
      }
      parking.store(Parking.awake, ordering: .sequentiallyConsistent)
      if hasLateFences.load(ordering: .relaxed), tryAcquire() {
        pollLateFences()
        release()
      }
    }
  }
}

// MARK: - The driver

extension TCPClientLoop {
  private func parkingEnd(_ rests: Bool, _ now: UInt64) -> Deadline {
    if rests { return Deadline(nanoseconds: now + Self.restNanoseconds) }
    if hasLateFences.load(ordering: .relaxed) {
      return Deadline(nanoseconds: now + Self.lateFenceNanoseconds)
    }
    return .never
  }

  private func drive(until deadline: Deadline, isDone: () -> Bool) {
    var quietSince: UInt64 = 0
    var now = Clock.now()
    // Traffic of others must not keep a waiter beyond its deadline.
    while !isDone(), now < deadline.nanoseconds, !isStopping.load(ordering: .relaxed) {
      if turn(now) {
        quietSince = 0
        now = Clock.now()
        continue
      }
      now = Clock.now()
      if quietSince == 0 { quietSince = now }
      if burstBytes <= Self.spinLimitBytes, now &- quietSince < spinNanoseconds {
        relaxProcessor()
        continue
      }
      burstBytes = 0
      block(until: deadline, isDone: isDone)
      quietSince = 0
      now = Clock.now()
    }
    lastActivity.store(now, ordering: .relaxed)
  }

  /// Sleeps until a socket, a timer, a kick or the deadline.
  private func block(until deadline: Deadline, isDone: () -> Bool) {
    isPolling.store(true, ordering: .sequentiallyConsistent)
    if ready.load(ordering: .sequentiallyConsistent) == 0,
      !sweepRequested.load(ordering: .sequentiallyConsistent), !isDone(),
      !isStopping.load(ordering: .sequentiallyConsistent)
    {
      var wake = deadline.nanoseconds
      for endpoint in active { wake = min(wake, endpoint.nextTimer) }
      if !fences.isEmpty { wake = min(wake, fenceTimer) }
      let timeout = Deadline(nanoseconds: wake).remainingMilliseconds
      let count = epoll.wait(into: events, timeoutMilliseconds: timeout)
      isPolling.store(false, ordering: .sequentiallyConsistent)
      now = Clock.now()
      dispatch(count)
      settle()
    } else {
      isPolling.store(false, ordering: .sequentiallyConsistent)
    }
  }

  /// Does what can be done without waiting; returns whether that was anything.
  private func turn(_ now: UInt64) -> Bool {
    self.now = now
    var isBusy = takeReady()
    attendTimers(now)
    if active.count <= Self.directLimit, fences.count == lateFences,
      active.allSatisfy({ $0.isConnected })
    {
      for index in active.indices where active[index].progress() { isBusy = true }
    } else if !active.isEmpty || !fences.isEmpty {
      let count = epoll.wait(into: events, timeoutMilliseconds: 0)
      dispatch(count)
      isBusy = isBusy || count > 0
    }
    settle()
    return isBusy
  }

  private func dispatch(_ count: Int) {
    for index in 0..<count {
      let token = events[index].data.u64
      if token == Self.wakeupToken {
        wakeup.clear()
      } else if let endpoint = watched[token] {
        endpoint.handle(events[index].events)
      } else {
        progressFence(token)
      }
    }
  }

  private func attendTimers(_ now: UInt64) {
    let sweeps =
      sweepRequested.load(ordering: .relaxed)
      && sweepRequested.exchange(false, ordering: .sequentiallyConsistent)
    // An endpoint may leave the list while it is attended to only through `settle`.
    for index in active.indices where sweeps || now >= active[index].nextTimer {
      active[index].attend(now, sweeps: sweeps)
    }
    if sweeps {
      for endpoint in watched.values where !endpoint.isActive { endpoint.attend(now, sweeps: true) }
    }
    if !fences.isEmpty { expireFences() }
  }

  @discardableResult
  private func takeReady() -> Bool {
    if ready.load(ordering: .sequentiallyConsistent) == 0 { return false }
    var cursor = ready.exchange(0, ordering: .sequentiallyConsistent)
    while let pointer = UnsafeRawPointer(bitPattern: cursor) {
      let endpoint = Unmanaged<TCPEndpoint>.fromOpaque(pointer).takeRetainedValue()
      cursor = endpoint.nextReady
      // Before the inbox is read: a later push schedules again.
      endpoint.isScheduled.store(false, ordering: .sequentiallyConsistent)
      endpoint.probeIdle()
      endpoint.takeInbox()
      endpoint.reviewHeld()
      if endpoint.peer.isRetired { endpoint.sweep(Clock.now()) }
      if endpoint.hasSlices && !endpoint.isActive {
        endpoint.isActive = true
        active.append(endpoint)
      }
      _ = endpoint.progress()
    }
    return true
  }

  /// Drops endpoints with nothing left to do from the active list.
  private func settle() {
    var index = 0
    while index < active.count {
      if !active[index].hasSlices {
        if active[index].peer.isRetired { active[index].closeSocket() }
        active[index].isActive = false
        active.swapAt(index, active.count - 1)
        active.removeLast()
      } else {
        index += 1
      }
    }
    let awaited = fences.isEmpty ? 0 : fences.count - lateFences
    activeCount.store(active.count + awaited, ordering: .sequentiallyConsistent)
    flushCounters()
  }

  /// Starts to watch a socket for an endpoint.
  func watch(_ socket: Int32, events: UInt32, for endpoint: TCPEndpoint) throws(Errno) -> UInt64 {
    let token = nextToken
    nextToken += 1
    try epoll.add(socket, events: events, token: token)
    watched[token] = endpoint
    return token
  }

  func rewatch(_ socket: Int32, events: UInt32, token: UInt64) {
    try? epoll.modify(socket, events: events, token: token)
  }

  func unwatch(_ socket: Int32, token: UInt64) {
    epoll.remove(socket)
    watched[token] = nil
  }

  /// Counts an ended slice.
  @inline(__always)
  func count(_ slice: SlicePointer, _ outcome: Outcome) {
    let length = slice.pointee.length
    if outcome != .completed {
      counters.failedSlices.wrappingAdd(1, ordering: .relaxed)
      return
    }
    completedSlices += 1
    if slice.pointee.opcode == .read { readBytes &+= length } else { writtenBytes &+= length }
  }

  private func flushCounters() {
    if completedSlices == 0 { return }
    counters.completedSlices.wrappingAdd(UInt64(completedSlices), ordering: .relaxed)
    counters.readBytes.wrappingAdd(UInt64(readBytes), ordering: .relaxed)
    counters.writtenBytes.wrappingAdd(UInt64(writtenBytes), ordering: .relaxed)
    completedSlices = 0
    readBytes = 0
    writtenBytes = 0
  }
}
