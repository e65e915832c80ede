import CLinux
import Glibc
import MooncakeSystem
import Synchronization

/// Drives the client connections assigned to it.
///
/// Whoever holds the token is the driver: the loop's own thread, or a thread that waits for its
/// batch and so saves two wake-ups. Everything below "The driver" belongs to the driver.
package final class TCPClientLoop: Driver, @unchecked Sendable {
  package static let isExclusive = true

  // Unchecked: see above; the rest is atomic.
  private let ready = ReadyStack()
  private let driver = DriverToken()
  /// Whether the driver sleeps in epoll and must be woken through `wakeup`.
  private let isPolling = Atomic<Bool>(false)
  /// How the loop's own thread sleeps on `doorbell`, if it does.
  private let parking = Atomic<UInt8>(Parking.awake)
  private let doorbell = Futex()
  private let lastActivity = Atomic<UInt64>(0)
  private let activeCount = Atomic<Int>(0)
  private let sweepRequested = Atomic<Bool>(false)
  private let isStopping = Atomic<Bool>(false)
  private let wakeup: EventFD
  private let epoll: Epoll
  let counters: TCPCounters
  /// Its bit in sets of drivers; set before the loop is shared.
  package internal(set) var driverBit = 0
  private let spinNanoseconds: UInt64
  private var thread: WorkerThread?

  let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: TCPWire.vectorLimit)
  let headers = UnsafeMutableRawPointer.allocate(
    byteCount: TCPWire.vectorLimit * TCPWire.headerBytes, alignment: 64)
  let statuses = UnsafeMutableRawPointer.allocate(
    byteCount: TCPWire.vectorLimit * TCPWire.statusBytes, alignment: 64)
  private let events = UnsafeMutableBufferPointer<epoll_event>.allocate(capacity: 128)
  /// Endpoints with slices.
  private var active: [TCPEndpoint] = []
  private var watched: [UInt64: TCPEndpoint] = [:]
  private let fences: FenceTable
  private var nextToken: UInt64 = 1
  /// Bytes moved since the driver last waited.
  private var burstBytes = 0
  private var completedSlices = 0
  private var readBytes = 0
  private var writtenBytes = 0

  private enum Parking {
    static let awake: UInt8 = 0
    /// It looks for work every `restNanoseconds`.
    static let resting: UInt8 = 1
    /// It sleeps until it is woken.
    static let asleep: UInt8 = 2
  }

  /// Active callers usually drive the loop themselves. Its own thread then only checks now and then
  /// whether somebody left work behind, which saves one wake-up per submit.
  private static let restNanoseconds: UInt64 = 500_000
  private static let activeNanoseconds: UInt64 = 10_000_000

  private static let lateFenceNanoseconds: UInt64 = 1_000_000_000

  private static let wakeupToken: UInt64 = 0
  /// After a burst of more bytes the driver does not spin: the peer needs the processor more.
  private static let spinLimitBytes = 64 << 10
  /// Up to so many busy connections are tried directly, without asking epoll.
  private static let directPollLimit = 2

  package init(counters: TCPCounters, spinNanoseconds: UInt64) throws(Errno) {
    self.counters = counters
    self.spinNanoseconds = spinNanoseconds
    fences = FenceTable(counters: counters)
    wakeup = try EventFD()
    epoll = try Epoll()
    try epoll.add(wakeup.descriptor.rawValue, events: Epoll.readable, token: Self.wakeupToken)
  }

  deinit {
    vectors.deallocate()
    headers.deallocate()
    statuses.deallocate()
    events.deallocate()
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
    // A caller may still drive; it stops when it sees `isStopping`.
    while !driver.tryTake() { sched_yield() }
    takeReady()
    var endpoints: [ObjectIdentifier: TCPEndpoint] = [:]
    for endpoint in active { endpoints[ObjectIdentifier(endpoint)] = endpoint }
    for endpoint in watched.values { endpoints[ObjectIdentifier(endpoint)] = endpoint }
    for endpoint in endpoints.values { endpoint.shutDown() }
    active.removeAll()
    fences.removeAll(epoll: epoll)
    flushCounters()
    driver.giveBack()
  }
}

// MARK: - Any thread

extension TCPClientLoop {
  /// Puts an endpoint on the ready stack unless it is there.
  func schedule(_ endpoint: TCPEndpoint) { ready.push(endpoint) }

  /// Makes sure that somebody looks at the ready stack soon. Everything is sequentially consistent:
  /// either the sleeper sees the stack or this sees the sleeper.
  package func kick() {
    if isPolling.exchange(false, ordering: .sequentiallyConsistent) { return wakeup.signal() }
    if driver.isTaken { return }
    if parking.exchange(Parking.awake, ordering: .sequentiallyConsistent) != Parking.awake {
      doorbell.increment()
      doorbell.wakeAll()
    }
  }

  /// Like `kick`, but leaves a resting thread alone: for work that its submitter is about to drive.
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

  private func release() {
    driver.giveBack()
    if hasWork { kick() }
  }

  private var hasWork: Bool {
    !ready.isEmpty
      || activeCount.load(ordering: .sequentiallyConsistent) > 0
      || sweepRequested.load(ordering: .sequentiallyConsistent)
  }

  /// Drives until `isDone`, if nobody else does. Returns whether it did drive.
  package func driveIfFree(until deadline: Deadline, isDone: () -> Bool) -> Bool {
    guard driver.tryTake() else { return false }
    drive(until: deadline, isDone: isDone)
    release()
    return true
  }

  /// One turn without waiting, if nobody drives.
  package func pollIfFree() -> Bool {
    guard hasWork, driver.tryTake() else { return false }
    let now = Clock.now()
    _ = turn(now)
    lastActivity.store(now, ordering: .relaxed)
    driver.giveBack()
    if hasWork { nudge() }
    return true
  }
}

// MARK: - The loop's own thread

extension TCPClientLoop {
  private func run() {
    while !isStopping.load(ordering: .sequentiallyConsistent) {
      if hasWork, driver.tryTake() {
        drive(until: .never) { [unowned self] in !hasWork }
        driver.giveBack()
        continue
      }
      let bell = doorbell.value
      let now = Clock.now()
      let rests = now &- lastActivity.load(ordering: .relaxed) < Self.activeNanoseconds
      parking.store(
        rests ? Parking.resting : Parking.asleep, ordering: .sequentiallyConsistent)
      // The thread must not sleep while there is work that nobody drives.
      if !(hasWork && !driver.isTaken)
        && !isStopping.load(ordering: .sequentiallyConsistent)
      {
        doorbell.wait(while: bell, until: parkingEnd(rests, now))
      }
      parking.store(Parking.awake, ordering: .sequentiallyConsistent)
      if fences.hasLate, driver.tryTake() {
        fences.progressLate(epoll: epoll)
        release()
      }
    }
  }
}

// MARK: - The driver

extension TCPClientLoop {
  private func parkingEnd(_ rests: Bool, _ now: UInt64) -> Deadline {
    if rests { return Deadline(nanoseconds: now + Self.restNanoseconds) }
    if fences.hasLate {
      return Deadline(nanoseconds: now + Self.lateFenceNanoseconds)
    }
    return .never
  }

  private func drive(until deadline: Deadline, isDone: () -> Bool) {
    var quietSince: UInt64 = 0
    var now = Clock.now()
    // Other traffic must not keep a waiter beyond its deadline.
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
    if ready.isEmpty,
      !sweepRequested.load(ordering: .sequentiallyConsistent), !isDone(),
      !isStopping.load(ordering: .sequentiallyConsistent)
    {
      var wake = deadline.nanoseconds
      for endpoint in active { wake = min(wake, endpoint.nextTimer) }
      if !fences.isEmpty { wake = min(wake, fences.nextExpiry) }
      let timeout = Deadline(nanoseconds: wake).remainingMilliseconds
      let count = epoll.wait(into: events, timeoutMilliseconds: timeout)
      isPolling.store(false, ordering: .sequentiallyConsistent)
      dispatch(count)
      finishTurn()
    } else {
      isPolling.store(false, ordering: .sequentiallyConsistent)
    }
  }

  /// Does what can be done without waiting; returns whether that was anything.
  private func turn(_ now: UInt64) -> Bool {
    var isBusy = takeReady()
    handleTimers(now)
    if active.count <= Self.directPollLimit, fences.awaitedCount == 0,
      active.allSatisfy({ $0.isConnected })
    {
      for index in active.indices where active[index].progress() { isBusy = true }
    } else if !active.isEmpty || !fences.isEmpty {
      let count = epoll.wait(into: events, timeoutMilliseconds: 0)
      dispatch(count)
      isBusy = isBusy || count > 0
    }
    finishTurn()
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
        fences.progress(token, epoll: epoll)
      }
    }
  }

  private func handleTimers(_ now: UInt64) {
    let sweeps =
      sweepRequested.load(ordering: .relaxed)
      && sweepRequested.exchange(false, ordering: .sequentiallyConsistent)
    // Endpoints leave the list in `finishTurn` only.
    for index in active.indices where sweeps || now >= active[index].nextTimer {
      active[index].handleTimers(now, sweeps: sweeps)
    }
    if sweeps {
      for endpoint in watched.values where !endpoint.isActive {
        endpoint.handleTimers(now, sweeps: true)
      }
    }
    if !fences.isEmpty { fences.expire(now) }
  }

  @discardableResult
  private func takeReady() -> Bool {
    if ready.isEmpty { return false }
    ready.takeAll { endpoint in
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

  /// Drops endpoints without slices from the active list and publishes what other threads look at.
  private func finishTurn() {
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
    activeCount.store(active.count + fences.awaitedCount, ordering: .sequentiallyConsistent)
    flushCounters()
  }

  private func makeToken() -> UInt64 {
    defer { nextToken += 1 }
    return nextToken
  }

  /// Keeps a connection whose unanswered writes may still land until the peer has closed it.
  func fence(_ socket: consuming Socket, _ peer: TCPPeer, unanswered: [Range<UInt64>]) {
    assertDriven()
    fences.add(socket, peer, unanswered: unanswered, token: makeToken(), epoll: epoll)
  }

  /// Starts to watch a socket for an endpoint.
  func watch(_ socket: Int32, events: UInt32, for endpoint: TCPEndpoint) throws(Errno) -> UInt64 {
    let token = makeToken()
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

  /// In debug builds, stops a thread that touches the loop's state without driving it.
  @inline(__always)
  func assertDriven() { driver.assertHeld() }

  /// Counts bytes that were sent or received.
  @inline(__always)
  func noteMoved(_ byteCount: Int) { burstBytes &+= byteCount }

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
