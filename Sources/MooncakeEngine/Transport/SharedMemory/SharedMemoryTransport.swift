import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// The shared-memory transport of one engine: its server, the server's thread, and the queue of
/// copies that are too large for the submitting thread.
package final class SharedMemoryTransport: Transport, Driver, @unchecked Sendable {
  package static let name = "shm"
  package static let isExclusive = false

  // Unchecked: everything is set in `init` or synchronized.
  package let server: SharedMemoryServer
  package let counters = SharedMemoryCounters()
  private let loop: SharedMemoryLoop
  /// This engine as a peer of itself: its table and slots, for the local side of copies.
  package let own: SharedMemoryPeer
  private let vectorBytes = linux_vector_bytes()

  /// Slices for one peer in the queue.
  private struct Work: @unchecked Sendable {
    // Unchecked: whoever takes it out of the queue owns the slices.
    var path: SharedMemoryPath
    var peer: SharedMemoryPeer
    var slices: SliceQueue
    var streams: Bool
  }

  private struct State: Sendable {
    var queue: [Work] = []
    var helpers: [WorkerThread] = []
    var isStopping = false
  }
  private let state = Lock(State())
  private let queued = Atomic<Int>(0)
  private let doorbell = Futex()
  private let users = Atomic<Int>(0)
  private let helperCount: Int
  private let cancellation: Int32
  /// Where helpers run; nil for anywhere.
  private let processors: ProcessorSet?
  private let background: @Sendable (@escaping @Sendable () -> Void) -> Bool
  /// Its bit in sets of drivers.
  package private(set) var driverBit = 0

  /// Up to this many bytes the submitting thread copies itself, even if it does not wait.
  package static let inlineBytes = 1 << 20
  /// Larger requests are cut, so that threads share one request.
  static let pieceBytes = 1 << 20
  /// Up to this many bytes a waiting thread copies alone.
  private static let aloneBytes = 4 << 20
  /// From this size on non-temporal stores are faster, since the data leaves the caches anyway.
  private static let streamBytes = 512 << 10

  /// Serves the peers that connect to a listener.
  package init(
    _ context: TransportContext, listener: SharedMemoryServer.Listener
  ) throws(Errno) {
    cancellation = context.cancellation
    helperCount = context.threadCount
    processors = context.processors
    background = context.background
    server = try SharedMemoryServer(buffers: context.buffers, listener: listener)
    loop = try SharedMemoryLoop(server: server)
    do throws(Errno) {
      own = try Self.connectOwn(listener.name, cancellation)
      try loop.watch(own)
      guard let bit = context.drivers.add(self) else { throw Errno(ENOSPC) }
      driverBit = bit
    } catch {
      loop.stop()
      throw error
    }
  }

  package convenience init(_ context: TransportContext) throws(MooncakeError) {
    if HostIdentity.current.isEmpty {
      throw MooncakeError(.unsupported, "shared memory is off: the host has no identity")
    }
    do throws(Errno) {
      try self.init(context, listener: SharedMemoryServer.listen())
    } catch {
      throw MooncakeError(.system, "shared memory is off: \(error)")
    }
  }

  package var name: String { Self.name }

  package func describe(in descriptor: inout SegmentDescriptor) {
    descriptor.hostIdentity = HostIdentity.current
    descriptor.sharedMemoryName = server.name
  }

  package var memory: (any MappableMemory)? { server }

  package func offer(_ new: [BufferTable.Buffer]) { server.publish() }

  package func revoke(_ buffers: [BufferTable.Buffer], until call: Call) -> String? {
    server.revoke(until: call.deadline, unless: { call.isCanceled })
  }

  /// Retries, since the loop accepts already: a full queue of connections empties soon.
  private static func connectOwn(
    _ name: String, _ cancellation: Int32
  ) throws(Errno) -> SharedMemoryPeer {
    let deadline = Deadline.after(milliseconds: 5000)
    while true {
      do throws(Errno) {
        return try SharedMemoryPeer(
          to: name, segmentName: "of this engine", deadline: deadline, cancellation: cancellation)
      } catch {
        if error != .wouldBlock || deadline.hasPassed { throw error }
        sleepBriefly(nanoseconds: 1_000_000)
      }
    }
  }

  /// A path to the memory of a descriptor's process, if that is on this host. A process that does
  /// not answer now is tried again later.
  package func connect(
    to descriptor: SegmentDescriptor, former: [any Path], for link: SegmentLink, deadline: Deadline
  ) throws(MooncakeError) -> [any Path] {
    if descriptor.sharedMemoryName.isEmpty {
      throw MooncakeError(.unsupported, "the peer does not share its memory")
    }
    if HostIdentity.current.isEmpty || descriptor.hostIdentity != HostIdentity.current {
      throw MooncakeError(.unsupported, "the peer is on another host or in other namespaces")
    }
    let place = SharedMemoryPath.Place(descriptor)
    for case let path as SharedMemoryPath in former where path.place == place {
      path.reviveIfLost(until: deadline)
      return [path]
    }
    let isOwn = place.socket == server.name
    let path = SharedMemoryPath(
      place, link: link, transport: self, own: isOwn ? own : nil, background: background)
    if !isOwn { path.connect(until: deadline) }
    return [path]
  }

  /// Reaches the process that serves a socket and watches it.
  func connect(
    to socket: String, segmentName: String, deadline: Deadline
  ) throws(Errno) -> SharedMemoryPeer {
    let peer = try SharedMemoryPeer(
      to: socket, segmentName: segmentName, deadline: deadline, cancellation: cancellation)
    try loop.watch(peer)
    return peer
  }

  /// Drops a peer that no path uses any more; copies under way continue.
  func forget(_ peer: SharedMemoryPeer) {
    if peer !== own { loop.forget(peer) }
  }

  /// Ends queued copies as canceled, waits for running ones and takes everything back from peers.
  /// Returns a thread that was still copying when the deadline passed.
  package func stop(until deadline: Deadline) -> String? {
    let (queue, helpers) = state.withLock { state in
      state.isStopping = true
      defer {
        state.queue = []
        state.helpers = []
      }
      return (state.queue, state.helpers)
    }
    doorbell.increment()
    doorbell.wakeAll()
    for work in queue {
      var slices = work.slices
      while let slice = slices.popFirst() {
        Batch.end(slice, .canceled, reason: "shared memory: engine destroyed")
      }
    }
    for helper in helpers { helper.join() }
    while users.load(ordering: .sequentiallyConsistent) > 0 { sleepBriefly(nanoseconds: 20_000) }
    let late = server.stop(until: deadline)
    loop.stop()
    return late
  }
}

// MARK: - Copying at once

extension SharedMemoryTransport {
  /// Copies one range; false if it must go another way.
  @inline(__always)
  func copy(
    _ path: SharedMemoryPath, _ peer: SharedMemoryPeer, _ opcode: Opcode,
    _ local: UnsafeMutableRawPointer, _ remote: UInt64, _ count: Int
  ) -> Bool {
    var copier = SharedMemoryCopier(peer, own: own, vectorBytes: vectors(for: count))
    let isDone = copier.copyPiece(opcode, local, remote, count)
    if isDone {
      counters.count(opcode, count)
      path.countMoved(count)
    }
    return isDone
  }

  /// Copies and ends the slices that `next` yields; returns those that must go another way.
  package func copy(
    _ path: SharedMemoryPath, _ peer: SharedMemoryPeer, totalBytes: Int, now: UInt64 = 0,
    next: () -> SlicePointer?
  ) -> SliceQueue {
    withUnsafeTemporaryAllocation(of: iovec.self, capacity: 2 * SharedMemoryRun.vectorLimit) {
      var run = SharedMemoryRun(
        SharedMemoryCopier(peer, own: own, vectorBytes: vectors(for: totalBytes)),
        vectors: $0.baseAddress!, now: now)
      while let slice = next() { run.add(slice) }
      run.flush()
      counters.add(run.tally)
      path.countMoved(run.tally.readBytes + run.tally.writtenBytes)
      return run.refused
    }
  }

  @inline(__always)
  private func vectors(for byteCount: Int) -> Int32 {
    byteCount >= Self.streamBytes ? vectorBytes : 0
  }
}

// MARK: - Copying later

extension SharedMemoryTransport {
  /// Queues slices. Threads that wait or poll copy them, and the engine's own threads help unless
  /// the caller is about to wait and can copy them alone.
  func enqueue(
    _ path: SharedMemoryPath, _ peer: SharedMemoryPeer, _ slices: SliceQueue, byteCount: Int,
    isAsynchronous: Bool
  ) {
    guard let batch = slices.first?.pointee.batch else { return }
    // First, so that a thread which waits already sees what it can help with.
    batch.use(DriverSet(bit: driverBit))
    let work = Work(path: path, peer: peer, slices: slices, streams: byteCount >= Self.streamBytes)
    queued.wrappingAdd(1, ordering: .sequentiallyConsistent)
    let wantsHelp = isAsynchronous || byteCount > Self.aloneBytes
    let isQueued = state.withLock { state in
      if state.isStopping || (wantsHelp && !startHelpers(&state)) { return false }
      state.queue.append(work)
      return true
    }
    if isQueued {
      if !wantsHelp { return }
      doorbell.increment()
      doorbell.wakeAll()
    } else {
      queued.wrappingSubtract(1, ordering: .sequentiallyConsistent)
      execute(work)
    }
  }

  package func kick() {
    doorbell.increment()
    doorbell.wakeAll()
  }

  package func nudge() { kick() }

  /// Deadlines and cancellations are looked at before each slice.
  package func requestSweep() {}

  package func driveIfFree(until deadline: Deadline, isDone: () -> Bool) -> Bool {
    var hasDriven = false
    while !isDone(), !deadline.hasPassed, pollIfFree() { hasDriven = true }
    return hasDriven
  }

  /// Copies a part of the queue; false if it is empty.
  package func pollIfFree() -> Bool {
    if queued.load(ordering: .sequentiallyConsistent) == 0 { return false }
    users.wrappingAdd(1, ordering: .sequentiallyConsistent)
    defer { users.wrappingSubtract(1, ordering: .sequentiallyConsistent) }
    guard let work = take() else { return false }
    execute(work)
    return true
  }

  /// Whether there is a helper.
  private func startHelpers(_ state: inout State) -> Bool {
    while state.helpers.count < helperCount {
      guard
        let thread = try? WorkerThread.start(
          name: "mc-shm-copy\(state.helpers.count)", on: processors,
          { [unowned self] in runHelper() })
      else { break }
      state.helpers.append(thread)
    }
    return !state.helpers.isEmpty
  }

  private func runHelper() {
    while true {
      let bell = doorbell.value
      if let work = take() {
        execute(work)
      } else if state.withLock({ $0.isStopping }) {
        return
      } else {
        doorbell.wait(while: bell, until: .never)
      }
    }
  }

  /// Takes about one piece off the first entry and moves the rest of it to the end, so that peers
  /// and batches share the threads.
  private func take() -> Work? {
    state.withLock { state in
      if state.queue.isEmpty { return nil }
      var first = state.queue.removeFirst()
      var part = SliceQueue()
      var byteCount = 0
      while byteCount < SharedMemoryCopier.pieceBytes, let slice = first.slices.popFirst() {
        byteCount += slice.pointee.length
        part.append(slice)
      }
      if first.slices.isEmpty {
        queued.wrappingSubtract(1, ordering: .sequentiallyConsistent)
      } else {
        state.queue.append(first)
      }
      return Work(path: first.path, peer: first.peer, slices: part, streams: first.streams)
    }
  }

  private func execute(_ work: Work) {
    var slices = work.slices
    var refused = copy(
      work.path, work.peer, totalBytes: work.streams ? Self.streamBytes : 0, now: Clock.now()
    ) { slices.popFirst() }
    while let slice = refused.popFirst() { work.path.giveBack(slice) }
  }
}

// MARK: - Counters

extension SharedMemoryTransport {
  package var totals: TransportTotals {
    TransportTotals(
      readBytes: counters.readBytes, writtenBytes: counters.writtenBytes,
      completedSlices: counters.completedSlices, failedSlices: counters.failedSlices)
  }

  package var metrics: [TransportCounter] {
    [
      .init(
        "shared_memory_read_bytes", "Of these, bytes read through shared memory.",
        counters.readBytes.load(ordering: .relaxed)),
      .init(
        "shared_memory_written_bytes", "Of these, bytes written through shared memory.",
        counters.writtenBytes.load(ordering: .relaxed)),
      .init(
        "shared_memory_requests", "Slices completed through shared memory.",
        counters.completedSlices.load(ordering: .relaxed)),
      .init(
        "shared_memory_fallbacks", "Slices for a peer of the same host that fell back to TCP.",
        counters.refusedSlices.load(ordering: .relaxed)),
      .init(
        "shared_memory_peers", "Peers that reach the buffers through shared memory.",
        UInt64(server.connectionCount), kind: .gauge),
    ]
  }
}

/// Totals of an engine's shared-memory transport.
package final class SharedMemoryCounters: Sendable {
  package let readBytes = Atomic<UInt64>(0)
  package let writtenBytes = Atomic<UInt64>(0)
  package let completedSlices = Atomic<UInt64>(0)
  package let failedSlices = Atomic<UInt64>(0)
  /// Slices that fell back to TCP.
  package let refusedSlices = Atomic<UInt64>(0)

  /// The totals of one run.
  struct Tally {
    var readBytes = 0
    var writtenBytes = 0
    var completions = 0
    var failures = 0
    var refusals = 0

    @inline(__always)
    mutating func count(_ opcode: Opcode, _ byteCount: Int) {
      completions += 1
      if opcode == .read { readBytes += byteCount } else { writtenBytes += byteCount }
    }
  }

  @inline(__always)
  fileprivate func count(_ opcode: Opcode, _ byteCount: Int) {
    completedSlices.wrappingAdd(1, ordering: .relaxed)
    let bytes = UInt64(byteCount)
    if opcode == .read {
      readBytes.wrappingAdd(bytes, ordering: .relaxed)
    } else {
      writtenBytes.wrappingAdd(bytes, ordering: .relaxed)
    }
  }

  fileprivate func add(_ tally: Tally) {
    completedSlices.wrappingAdd(UInt64(tally.completions), ordering: .relaxed)
    readBytes.wrappingAdd(UInt64(tally.readBytes), ordering: .relaxed)
    writtenBytes.wrappingAdd(UInt64(tally.writtenBytes), ordering: .relaxed)
    if tally.failures > 0 { failedSlices.wrappingAdd(UInt64(tally.failures), ordering: .relaxed) }
    if tally.refusals > 0 { refusedSlices.wrappingAdd(UInt64(tally.refusals), ordering: .relaxed) }
  }
}
