import CLinux
import Glibc
import MooncakeSystem

/// A receive buffer whose contents the kernel can scatter into registered memory.
///
/// Small writes arrive many to a receive call, each for another address. Copying them with plain
/// stores would end the process where a host has unmapped or protected memory that it registered;
/// reading them from a memory file makes the kernel do the stores, and such memory becomes an error
/// code.
package struct ScatterBuffer: ~Copyable {
  private let file: FileDescriptor
  private let mapping: MemoryMapping
  private let vectors: UnsafeMutablePointer<iovec>
  private let junk: UnsafeMutableRawPointer
  private var vectorCount = 0
  private var start = 0
  private var end = 0

  private static let vectorLimit = 256
  private static let junkBytes = 4096

  package static let byteCount = 256 << 10

  package init() throws(Errno) {
    let file = try FileDescriptor(
      opening: { memfd_create("mooncake-input", UInt32(MFD_CLOEXEC)) })
    let descriptor = file.rawValue
    _ = try retryingInterrupts { ftruncate(descriptor, Self.byteCount) }
    let mapping = try MemoryMapping.shared(descriptor, byteCount: Self.byteCount, writable: true)
    self.file = file
    self.mapping = mapping
    vectors = .allocate(capacity: Self.vectorLimit)
    junk = .allocate(byteCount: Self.junkBytes, alignment: 64)
  }

  deinit {
    vectors.deallocate()
    junk.deallocate()
  }

  package var address: UnsafeMutableRawPointer { mapping.address }

  /// Notes that `count` bytes at `offset` belong at `target`; offsets grow from call to call.
  package mutating func add(
    offset: Int, count: Int, target: UnsafeMutableRawPointer
  ) throws(Errno) {
    let gap = offset - end
    if vectorCount == 0 {
      start = offset
    } else if gap > Self.junkBytes || vectorCount + 2 > Self.vectorLimit {
      try flush()
      start = offset
    } else if gap > 0 {
      vectors[vectorCount] = iovec(iov_base: junk, iov_len: gap)
      vectorCount += 1
    }
    vectors[vectorCount] = iovec(iov_base: target, iov_len: count)
    vectorCount += 1
    end = offset + count
  }

  /// Stores everything noted. Throws when some memory does not take it.
  package mutating func flush() throws(Errno) {
    if vectorCount == 0 { return }
    let expected = end - start
    let count = vectorCount
    vectorCount = 0
    let stored = try retryingInterrupts {
      preadv(file.rawValue, vectors, Int32(count), off_t(start))
    }
    // Short only where a page of the target cannot be written.
    if stored != expected { throw Errno(EFAULT) }
  }
}
