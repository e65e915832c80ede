import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// The memory of one process of this host. If it cannot be reached, or is lost, the path rests and
/// tries again; meanwhile other paths move the slices.
package final class SharedMemoryPath: Path, @unchecked Sendable {
  // Unchecked: everything is set in `init` or synchronized. The transport outlives its paths' use.
  /// Where a process shares memory; another place is another process.
  struct Place: Equatable, Sendable {
    let host: String
    let socket: String
    let incarnation: UInt64

    init(_ descriptor: SegmentDescriptor) {
      host = descriptor.hostIdentity
      socket = descriptor.sharedMemoryName
      incarnation = descriptor.incarnation
    }
  }

  private enum Holder {
    case peer(SharedMemoryPeer)
    case none
    /// No peer is taken any more.
    case retired
  }

  let place: Place
  package let health: PathHealth
  package let mark: UInt64
  private unowned(unsafe) let transport: SharedMemoryTransport
  private let link: SegmentLink
  private let holder: Lock<Holder>
  private let moved = Atomic<UInt64>(0)
  private let background: @Sendable (@escaping @Sendable () -> Void) -> Bool

  /// How long a thread that others need too waits for a peer's greeting.
  private static let retryMilliseconds: UInt64 = 1_000

  init(
    _ place: Place, link: SegmentLink, transport: SharedMemoryTransport, own: SharedMemoryPeer?,
    background: @escaping @Sendable (@escaping @Sendable () -> Void) -> Bool
  ) {
    self.place = place
    self.link = link
    self.transport = transport
    self.background = background
    mark = link.makeMark()
    health = PathHealth(isInUse: own != nil)
    holder = Lock(own.map { .peer($0) } ?? .none)
  }

  package var transportName: String { SharedMemoryTransport.name }

  package var description: String { "shared memory of segment \(link.segmentName)" }

  package var gate: WriteGate? { nil }

  package var load: Int { 0 }

  package var movedBytes: UInt64 { moved.load(ordering: .relaxed) }

  package var traits: PathTraits {
    var traits = PathTraits()
    traits.checksRanges = true
    traits.copiesAtOnce = true
    traits.pieceBytes = SharedMemoryTransport.pieceBytes
    return traits
  }

  /// The process, if it is reached now.
  package var peer: SharedMemoryPeer? {
    holder.withLock { holder in
      if case .peer(let peer) = holder { return peer }
      return nil
    }
  }

  package var isUsable: Bool { peer?.isUsable ?? false }

  // MARK: Reaching the process

  /// Makes an attempt to reach the process. What it meets is noted in `health`.
  func connect(until deadline: Deadline) {
    do throws(Errno) {
      let peer = try transport.connect(
        to: place.socket, segmentName: link.segmentName, deadline: deadline)
      adopt(peer)
      if health.noteSuccess() { Log.info("\(description): reached now") }
    } catch {
      // Another attempt may have reached it meanwhile.
      if isUsable { return }
      // The peer's user and version and the kernel do not change.
      let isFinal = [EPERM, EACCES, EPROTO, ENOSYS].contains(error.rawValue)
      if health.noteFailure("\(error)", isFinal: isFinal) {
        Log.info(
          "\(description): \(error); it is reached another way"
            + (isFinal ? "" : " until a later attempt succeeds"), about: link.segmentName)
      }
    }
  }

  private func adopt(_ peer: SharedMemoryPeer) {
    let superfluous = holder.withLock { holder -> SharedMemoryPeer? in
      switch holder {
      case .retired: return peer
      case .none:
        holder = .peer(peer)
        return nil
      case .peer(let former):
        if former.isUsable { return peer }
        holder = .peer(peer)
        return former
      }
    }
    if let superfluous { transport.forget(superfluous) }
  }

  package func retryIfDue(_ now: UInt64) {
    guard health.isDue(now), health.beginAttempt(now) else { return }
    let isRunning = background { [self, transport] in
      defer { _ = transport }
      connect(until: .after(milliseconds: Self.retryMilliseconds))
    }
    if !isRunning { health.noteFailure("no thread to connect with") }
  }

  /// A process that was lost is tried at once; one that could not be reached, after its rest.
  func reviveIfLost(until deadline: Deadline) {
    guard let peer, !peer.isUsable else { return }
    connect(until: deadline)
  }

  package func retire(successor: PathSuccessor?) {
    let former = holder.withLock { holder -> SharedMemoryPeer? in
      defer { holder = .retired }
      if case .peer(let peer) = holder { return peer }
      return nil
    }
    if let former { transport.forget(former) }
  }

  // MARK: Moving

  package func check(_ run: inout SliceRun) {
    // Few bytes are looked up while they are copied.
    guard run.byteCount > SharedMemoryTransport.inlineBytes || run.isHandedOver, let peer else {
      return
    }
    let view = peer.currentView()
    var slices = run.takeSlices()
    while let slice = slices.popFirst() {
      if peer.grants(slice, view) { run.append(slice) } else { run.refused.append(slice) }
    }
  }

  package func submit(_ run: inout SliceRun) {
    guard let peer else {
      var slices = run.takeSlices()
      return run.refused.append(contentsOf: &slices)
    }
    let byteCount = run.byteCount
    if byteCount > SharedMemoryTransport.inlineBytes || run.isHandedOver {
      let isAsynchronous = run.isAsynchronous
      return transport.enqueue(
        self, peer, run.takeSlices(), byteCount: byteCount, isAsynchronous: isAsynchronous)
    }
    var refused = transport.copy(self, peer, totalBytes: byteCount) { run.popFirst() }
    if !refused.isEmpty { run.refused.append(contentsOf: &refused) }
  }

  package func copyAtOnce(
    _ opcode: Opcode, _ local: UnsafeMutableRawPointer, _ remote: UInt64, _ count: Int
  ) -> Bool {
    guard count <= SharedMemoryTransport.inlineBytes, let peer else { return false }
    return transport.copy(self, peer, opcode, local, remote, count)
  }

  @inline(__always)
  func countMoved(_ byteCount: Int) {
    moved.wrappingAdd(UInt64(byteCount), ordering: .relaxed)
  }

  /// Gives a queued slice back that could not be copied.
  func giveBack(_ slice: SlicePointer) { link.refusedHere(slice, on: mark) }
}
