import CLinux
import Glibc
import MooncakeSystem
import Synchronization

/// A process of this host, as an engine sees it, that can be in the middle of a copy for as long as
/// a test likes.
package final class StuckPeer {
  private let socket: LocalSocket
  private let slots: MemoryMapping

  /// `name` is the engine's shared memory socket, as its descriptor has it.
  package init(to name: String) throws {
    let socket = try LocalSocket.connected(to: name)
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

  /// A thread copies from now on, unguarded.
  package func beginCopy() { claim(thread: linux_gettid()) }

  package func endCopy() { claim(thread: 0) }

  /// The word of the second slot: a thread that copies, unguarded.
  package func claim(thread: Int32) {
    (slots.address + 64).assumingMemoryBound(to: Atomic<UInt64>.self).pointee
      .store(UInt64(UInt32(bitPattern: thread)), ordering: .sequentiallyConsistent)
  }
}
