import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// Keeps an engine's published entries current: puts them, renews their lease, puts them again if
/// the service has lost them, and removes them at the end. Its thread, `mc-metadata`, does all the
/// waiting for the service and sleeps in between.
package final class MetadataPublisher: Sendable {
  /// Counts since the start, except `isReachable`.
  package struct Counters: Sendable, Equatable {
    package var publications: UInt64 = 0
    package var renewals: UInt64 = 0
    /// Publications of entries that the service had lost.
    package var repetitions: UInt64 = 0
    package var failures: UInt64 = 0
    package var isReachable = true
    /// Whether the service answers but refuses the entries.
    package var isRefused = false
  }

  private let directory: MetadataDirectory
  private let local: LocalSegment
  private let routeKey: String
  private let rpcAddress: HostPort
  private let incarnation: String
  /// Canceled when the engine closes; without a deadline of its own.
  private let untilClose: Call

  /// Used only by the thread, and by `start` and `stop` while there is no thread.
  private struct Work: Sendable {
    var routeVersions = MetadataVersion()
    /// The entries put under the lease.
    var entries: [MetadataEntry] = []
    var isSuperseded = false
  }

  private struct State: Sendable {
    var keeper: LeaseKeeper
    var wanted: UInt64 = 0
    var published: UInt64 = 0
    /// The latest version for which an attempt has ended, successfully or not.
    var attempted: UInt64 = 0
    /// The last attempt's error, if the next would fail the same way.
    var refusal: MooncakeError?
    var isStopping = false
    var counters = Counters()

    /// Whether there are changes that cannot wait for the next regular attempt.
    var hasNews: Bool {
      wanted > published && (!keeper.isDown || refusal != nil && wanted > attempted)
    }
  }

  private let work = Lock(Work())
  private let state: Lock<State>
  private let doorbell = Futex()
  private let progress = Futex()
  private let thread = Lock<WorkerThread?>(nil)

  /// How often a wait checks for cancellation.
  private static let cancellationMilliseconds: UInt64 = 50

  package init(
    _ directory: MetadataDirectory, _ local: LocalSegment, rpcAddress: HostPort,
    untilClose: Call
  ) {
    self.directory = directory
    self.local = local
    self.untilClose = untilClose
    incarnation = SegmentDescriptor.text(incarnation: local.descriptor.incarnation)
    routeKey = directory.routeKey(local.name)
    self.rpcAddress = rpcAddress
    let keeper = LeaseKeeper(
      ttlMilliseconds: directory.settings.ttlMilliseconds, at: Clock.now())
    state = Lock(State(keeper: keeper))
  }

  deinit { stop() }

  package var counters: Counters { state.withLock { $0.counters } }

  /// Publishes for the first time, replacing what an earlier process left, and starts the thread.
  package func start(until deadline: Deadline) throws(MooncakeError) {
    let call = untilClose.within(deadline)
    do throws(MooncakeError) {
      try work.withLock { work throws(MooncakeError) in
        try publish(&work, isFirst: true, call)
        // Renew at once: if the user may put but not renew, fail now instead of vanishing when the
        // lease ends.
        _ = try renew(&work, call)
      }
    } catch {
      if lease != nil || work.withLock({ !$0.entries.isEmpty }) {
        remove(within: deadline.hasPassed ? Self.cancellationMilliseconds : nil)
      }
      throw error
    }
    do throws(Errno) {
      let thread = try WorkerThread.start(name: "mc-metadata") { [unowned self] in run() }
      self.thread.withLock { $0 = thread }
    } catch {
      remove()
      throw MooncakeError(.system, "cannot start the thread for metadata: \(error)")
    }
  }

  /// Publishes changes and waits until it is done or the call is over. If the service is
  /// unreachable, the changes are published when it is back. Throws if the service refuses them for
  /// good; it then keeps the old entries.
  package func publishChanges(_ call: Call) throws(MooncakeError) {
    let version = local.buffers.version
    state.withLock { $0.wanted = max($0.wanted, version) }
    ring()
    while true {
      let seen = progress.value
      let (isOver, refusal): (Bool, MooncakeError?) = state.withLock { state in
        if state.published >= version || state.isStopping { return (true, nil) }
        if let refusal = state.refusal { return (state.attempted >= version, refusal) }
        return (state.keeper.isDown, nil)
      }
      if isOver {
        if let refusal { throw refusal }
        return
      }
      if call.isOver { return }
      // A futex cannot also wait for a descriptor.
      let tick =
        call.cancellation < 0
        ? Deadline.never : .after(milliseconds: Self.cancellationMilliseconds)
      progress.wait(while: seen, until: min(call.deadline, tick))
    }
  }

  /// Ends the thread and removes the entries. The engine's close must already have canceled calls,
  /// so that a running one ends.
  package func stop() {
    let isFirst = state.withLock { state in
      defer { state.isStopping = true }
      return !state.isStopping
    }
    if !isFirst { return }
    ring()
    let running = thread.withLock { $0.take() }
    running?.join()
    progress.increment()
    progress.wakeAll()
    if running != nil { remove() }
  }

  private func ring() {
    doorbell.increment()
    doorbell.wakeAll()
  }

  private func remove(within milliseconds: UInt64? = nil) {
    let (lease, limit) = state.withLock { ($0.keeper.lease, $0.keeper.endMilliseconds) }
    work.withLock { work in
      do throws(MooncakeError) {
        try directory.store.revoke(
          lease, work.entries, Call(until: .after(milliseconds: milliseconds ?? limit)))
      } catch {
        Log.warning("segment \(local.name) stays published until its lease ends: \(error.message)")
      }
    }
  }

  // MARK: Thread

  private func run() {
    while true {
      let bell = doorbell.value
      let (isStopping, isDue) = state.withLock {
        ($0.isStopping, $0.hasNews || Clock.now() >= $0.keeper.next)
      }
      if isStopping { return }
      if isDue { work.withLock { step(&$0) } }
      let (isIdle, next) = state.withLock { (!$0.hasNews, $0.keeper.next) }
      if isIdle { doorbell.wait(while: bell, until: Deadline(nanoseconds: next)) }
    }
  }

  private func step(_ work: inout Work) {
    let (isNews, isDue, milliseconds) = state.withLock {
      ($0.wanted > $0.published, $0.keeper.isDue(at: Clock.now()), $0.keeper.callMilliseconds)
    }
    let call = untilClose.within(milliseconds: milliseconds)
    let version = local.buffers.version
    do throws(MooncakeError) {
      // Changes may come without a pause, and may be refused. They do not renew the lease.
      if work.entries.count == 2 && (isDue || !isNews) {
        let renewal = try renew(&work, call)
        if renewal == .kept {
          state.withLock { $0.counters.renewals &+= 1 }
          if !isNews { return succeeded { _ in } }
        }
      }
      try publish(&work, isFirst: false, call)
    } catch {
      failed(work, error, version)
    }
  }

  // MARK: Lease

  private var lease: MetadataLease? { state.withLock { $0.keeper.lease } }

  private func renew(_ work: inout Work, _ call: Call) throws(MooncakeError) -> MetadataRenewal {
    let (lease, asked) = (self.lease, Clock.now())
    let renewal = try directory.store.renew(lease, work.entries, call)
    if renewal == .gone {
      forgetLease(&work)
    } else {
      state.withLock { $0.keeper.renewed(lease, at: asked) }
      // They belong to another process or are gone.
      if renewal != .kept { work.entries = [] }
    }
    return renewal
  }

  private func forgetLease(_ work: inout Work) {
    state.withLock { _ = $0.keeper.forget($0.keeper.lease) }
    work.entries = []
  }

  // MARK: Entries

  /// Puts the entries; if the lease has ended, once more with a new one.
  private func publish(
    _ work: inout Work, isFirst: Bool, _ call: Call
  ) throws(MooncakeError) {
    do throws(MooncakeError) {
      return try publishOnce(&work, isFirst: isFirst, call)
    } catch {
      if error.code != .notFound { throw error }
      state.withLock { $0.counters.failures &+= 1 }
    }
    try publishOnce(&work, isFirst: isFirst, call)
  }

  private func publishOnce(
    _ work: inout Work, isFirst: Bool, _ call: Call
  ) throws(MooncakeError) {
    let isRepetition = !isFirst && work.entries.count < 2
    if isFirst || isRepetition {
      if try isForeign(&work, call) && !isFirst {
        supersede(&work)
        return
      }
    }
    // Without leases, entries stay until they are removed.
    var lease = self.lease
    if lease == nil && work.entries.isEmpty {
      let asked = Clock.now()
      let new = try directory.store.grant(
        ttlMilliseconds: directory.settings.ttlMilliseconds, call)
      lease = state.withLock { $0.keeper.granted(new, at: asked) }
    }
    // Read the version before the text: the text must contain everything up to that version.
    let version = local.buffers.version
    let segment = MetadataEntry(
      key: directory.segmentKey(local.name), value: directory.stored(local.json))
    do throws(MooncakeError) {
      if work.entries.isEmpty {
        let text = MetadataDirectory.routeText(
          rpcAddress, incarnation: local.descriptor.incarnation,
          metadataVersion: work.routeVersions.next())
        let route = MetadataEntry(key: routeKey, value: directory.stored(text))
        try directory.store.put(route, lease: lease, call)
        work.entries = [route]
      }
      try directory.store.put(segment, lease: lease, call)
      work.entries = [work.entries[0], segment]
    } catch {
      if error.code == .notFound { forgetLease(&work) }
      throw error
    }
    work.isSuperseded = false
    succeeded {
      $0.publications &+= 1
      if isRepetition { $0.repetitions &+= 1 }
    }
    advance(to: version)
    if isRepetition { Log.info("segment \(local.name) is published again") }
  }

  /// Whether another process has put the keys; if so, they stay. Also raises our version above the
  /// other's: readers that know the newer one would ignore ours.
  private func isForeign(_ work: inout Work, _ call: Call) throws(MooncakeError) -> Bool {
    let segmentKey = directory.segmentKey(local.name)
    var isForeign = false
    var latest: UInt64 = 0
    for key in [routeKey, segmentKey] {
      guard let text = try read(key, call) else { continue }
      if !text.utf8.holds(incarnation) { isForeign = true }
      let version = MetadataDirectory.metadataVersion(in: text)
      if key == routeKey { work.routeVersions.pass(version) } else { latest = version }
    }
    local.renewText(after: latest)
    return isForeign
  }

  /// The value of a key; empty if it is not text.
  private func read(_ key: String, _ call: Call) throws(MooncakeError) -> String? {
    do throws(MooncakeError) {
      return try directory.store.get(key, call)
    } catch {
      if error.code == .protocolViolation { return "" }
      throw error
    }
  }

  private func supersede(_ work: inout Work) {
    if !work.isSuperseded {
      Log.error(
        "segment \(local.name): another process has published this name in metadata "
          + "\(directory.store.uri); peers find that one until it ends")
    }
    work.isSuperseded = true
    if work.entries.isEmpty { forgetLease(&work) }
    // Look again after a period.
    state.withLock { $0.keeper.renewed($0.keeper.lease, at: Clock.now()) }
    succeeded { _ in }
    advance(to: local.buffers.version)
  }

  private func advance(to version: UInt64) {
    state.withLock {
      $0.published = max($0.published, version)
      $0.attempted = max($0.attempted, version)
    }
    progress.increment()
    progress.wakeAll()
  }

  private func succeeded(_ count: (inout Counters) -> Void) {
    let wasDown = state.withLock { state in
      count(&state.counters)
      state.refusal = nil
      state.counters.isReachable = true
      state.counters.isRefused = false
      return state.keeper.succeeded(at: Clock.now())
    }
    if wasDown { Log.info("metadata \(directory.store.uri) can be reached again") }
  }

  private func failed(_ work: Work, _ error: MooncakeError, _ version: UInt64) {
    let isNew = state.withLock { state in
      let wasRefused = state.refusal != nil
      state.refusal = error.isRefusal ? error : nil
      state.attempted = max(state.attempted, version)
      state.counters.failures &+= 1
      state.counters.isReachable = error.isRefusal
      state.counters.isRefused = error.isRefusal
      // Refused changes may be large. The service keeps the old entries meanwhile.
      let isFirst = state.keeper.failed(
        at: Clock.now(), isRefused: error.isRefusal && work.entries.count == 2)
      return isFirst || error.isRefusal && !wasRefused
    }
    progress.increment()
    progress.wakeAll()
    if !isNew || error.code == .canceled { return }
    if error.isRefusal {
      Log.error(
        "segment \(local.name): \(error.message) (transfers go on; peers find what was published "
          + "before, and no registration succeeds until the service takes it)")
    } else {
      Log.warning(
        "segment \(local.name): \(error.message) (transfers go on; the segment is "
          + "published again as soon as the service can be reached)")
    }
  }
}

extension MetadataDirectory {
  /// A text in the form that Mooncake stores: with a line end, except over HTTP.
  func stored(_ text: String) -> String { store.uri.service == .http ? text : text + "\n" }
}
