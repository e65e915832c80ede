import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// A process of this host, as an engine sees it, that can stay in the middle of a copy for as long
/// as a test wants.
final class StuckPeer {
  private let socket: LocalSocket
  private let slots: MemoryMapping

  init(_ engine: TransferEngine) throws {
    let socket = try LocalSocket.connected(to: engine.descriptor(of: 0).sharedMemoryName)
    var item = pollfd(fd: socket.rawValue, events: Int16(POLLIN), revents: 0)
    guard poll(&item, 1, 5000) > 0 else { throw Errno.timedOut }
    var greeting = [UInt8](repeating: 0, count: 32)
    let (_, descriptors) = try greeting.withUnsafeMutableBytes { try socket.receive($0) }
    guard descriptors.count == 2 else { throw Errno(EPROTO) }
    close(descriptors[0])
    let file = try MemoryFile(receiving: FileDescriptor(owning: descriptors[1]), byteCount: 4096)
    slots = try file.map(writable: true)
    self.socket = socket
  }

  /// From now on a thread is copying, unguarded.
  func beginCopy() { claim(linux_gettid()) }

  func endCopy() { claim(0) }

  private func claim(_ thread: Int32) {
    (slots.address + 64).assumingMemoryBound(to: Atomic<UInt64>.self).pointee
      .store(UInt64(UInt32(bitPattern: thread)), ordering: .sequentiallyConsistent)
  }
}
