import CLinux
import Glibc
import MooncakeSystem
import Synchronization

// Connections that were given up and whose end is awaited.
extension TCPClientLoop {
  private static let scratchBytes = 256 << 10

  /// Keeps a connection whose unanswered writes may still land until the peer has closed it.
  func fence(_ socket: consuming Socket, _ peer: TCPPeer, unanswered: [Range<UInt64>]) {
    let token = nextToken
    nextToken += 1
    let descriptor = socket.rawValue
    let fence = TCPFence(
      socket, token: token, expiry: Clock.now() &+ TCPFence.waitNanoseconds, peer: peer,
      unanswered: unanswered)
    counters.fences.wrappingAdd(1, ordering: .relaxed)
    fences[token] = fence
    do throws(Errno) {
      try epoll.add(descriptor, events: Epoll.readable, token: token)
    } catch {
      giveUp(fence, "cannot be watched: \(error)")
    }
  }

  /// Lets nobody wait for it any longer.
  private func giveUp(_ fence: TCPFence, _ reason: String) {
    fence.giveUp(reason)
    lateFences += 1
  }

  /// Follows one that has something to tell.
  func progressFence(_ token: UInt64) {
    guard let fence = fences[token] else { return }
    let scratch = fenceScratch ?? .allocate(byteCount: Self.scratchBytes, alignment: 64)
    fenceScratch = scratch
    let wasLate = fence.isOverdue
    switch fence.progress(scratch, Self.scratchBytes) {
    case .open: return
    case .closed: fence.lift()
    case .lost(let error): fence.giveUp("broke: \(error)")
    }
    epoll.remove(fence.descriptor)
    fences[token] = nil
    if wasLate { lateFences -= 1 }
    counters.fences.wrappingSubtract(1, ordering: .relaxed)
  }

  /// Lets nobody wait for a peer that takes too long. The connection stays: should the peer wake up
  /// and close it, writes may go on.
  func expireFences() {
    for fence in fences.values where !fence.isOverdue && now >= fence.expiry {
      giveUp(
        fence, "was not closed by the peer within \(TCPFence.waitNanoseconds / 1_000_000_000) s")
    }
  }

  /// Looks at late ones while nobody drives.
  func pollLateFences() {
    for fence in fences.values where fence.isOverdue { progressFence(fence.token) }
  }

  /// When the next fence is overdue.
  var fenceTimer: UInt64 {
    fences.values.reduce(.max) { $1.isOverdue ? $0 : min($0, $1.expiry) }
  }

  /// The loop is stopping.
  func dropFences() {
    for fence in fences.values { epoll.remove(fence.descriptor) }
    lateFences = 0
    counters.fences.wrappingSubtract(fences.count, ordering: .relaxed)
    fences.removeAll()
  }
}
