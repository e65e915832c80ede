import CLinux
import Glibc
import MooncakeSystem
import Synchronization

/// The connections of a loop that were given up with unanswered writes and whose end is awaited.
/// Driver only, but for `hasLate`.
final class FenceTable: @unchecked Sendable {
  // Unchecked: see above.
  private var fences: [UInt64: TCPFence] = [:]
  /// Those that nobody waits for any more. Others have the loop driven; these are looked at now and
  /// then, so that a peer which is away for long keeps no driver from other peers.
  private var lateCount = 0 {
    didSet { isAnyLate.store(lateCount > 0, ordering: .relaxed) }
  }
  private let isAnyLate = Atomic<Bool>(false)
  private let counters: TCPCounters
  /// Where what still arrives is discarded; made when first needed.
  private var scratch: UnsafeMutableRawPointer?

  private static let scratchBytes = 256 << 10

  init(counters: TCPCounters) { self.counters = counters }

  deinit { scratch?.deallocate() }

  /// Whether there are fences that `progressLate` must look at; for any thread.
  var hasLate: Bool { isAnyLate.load(ordering: .relaxed) }

  var isEmpty: Bool { fences.isEmpty }

  /// How many have writes wait for them.
  @inline(__always)
  var awaitedCount: Int { fences.isEmpty ? 0 : fences.count - lateCount }

  /// Keeps a connection whose unanswered writes may still land until the peer has closed it.
  func add(
    _ socket: consuming Socket, _ peer: TCPPeer, unanswered: [Range<UInt64>], token: UInt64,
    epoll: borrowing Epoll
  ) {
    let descriptor = socket.rawValue
    let fence = TCPFence(
      socket, token: token, expiry: Clock.now() &+ TCPFence.waitLimitNanoseconds, peer: peer,
      unanswered: unanswered)
    counters.fences.wrappingAdd(1, ordering: .relaxed)
    fences[token] = fence
    do throws(Errno) {
      try epoll.add(descriptor, events: Epoll.readable, token: token)
    } catch {
      giveUp(fence, "cannot be watched: \(error)")
    }
  }

  /// Makes writes that wait for it fail instead.
  private func giveUp(_ fence: TCPFence, _ reason: String) {
    fence.giveUp(reason)
    lateCount += 1
  }

  /// Reads from the one with this token, if there is one.
  func progress(_ token: UInt64, epoll: borrowing Epoll) {
    guard let fence = fences[token] else { return }
    let scratch = scratch ?? .allocate(byteCount: Self.scratchBytes, alignment: 64)
    self.scratch = scratch
    let wasLate = fence.isOverdue
    switch fence.progress(scratch, Self.scratchBytes) {
    case .open: return
    case .closed: fence.lift()
    case .lost(let error): fence.giveUp("broke: \(error)")
    }
    epoll.remove(fence.descriptor)
    fences[token] = nil
    if wasLate { lateCount -= 1 }
    counters.fences.wrappingSubtract(1, ordering: .relaxed)
  }

  /// Gives up on peers that take too long. Their connections stay: should such a peer wake up and
  /// close one, writes may go on.
  func expire(_ now: UInt64) {
    for fence in fences.values where !fence.isOverdue && now >= fence.expiry {
      let seconds = TCPFence.waitLimitNanoseconds / 1_000_000_000
      giveUp(fence, "was not closed by the peer within \(seconds) s")
    }
  }

  /// Looks at late ones while nobody drives.
  func progressLate(epoll: borrowing Epoll) {
    for fence in fences.values where fence.isOverdue { progress(fence.token, epoll: epoll) }
  }

  /// When the next fence is overdue.
  var nextExpiry: UInt64 {
    fences.values.reduce(.max) { $1.isOverdue ? $0 : min($0, $1.expiry) }
  }

  /// Closes all; the loop is stopping.
  func removeAll(epoll: borrowing Epoll) {
    for fence in fences.values { epoll.remove(fence.descriptor) }
    lateCount = 0
    counters.fences.wrappingSubtract(fences.count, ordering: .relaxed)
    fences.removeAll()
  }
}
