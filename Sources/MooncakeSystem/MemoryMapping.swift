import CLinux
import Glibc

/// Owns a range of mapped memory.
package struct MemoryMapping: ~Copyable, @unchecked Sendable {
  // Unchecked: the owner decides who touches the bytes.
  package let bytes: UnsafeMutableRawBufferPointer

  package var address: UnsafeMutableRawPointer { bytes.baseAddress! }
  package var count: Int { bytes.count }

  /// Takes ownership of a range that `munmap` may end.
  package init(owning bytes: UnsafeMutableRawBufferPointer) { self.bytes = bytes }

  /// Gives the range to the caller, who must unmap it.
  package consuming func release() -> UnsafeMutableRawBufferPointer {
    let bytes = self.bytes
    discard self
    return bytes
  }

  deinit { munmap(bytes.baseAddress!, bytes.count) }

  /// Maps zeroed private memory of a whole number of pages; asks for huge pages where they help.
  package static func anonymous(byteCount: Int) throws(Errno) -> MemoryMapping {
    let size = try roundedToPages(byteCount)
    guard
      let pointer = mmap(
        nil, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
      pointer != MAP_FAILED
    else { throw Errno.current }
    if size >= 2 << 20 { madvise(pointer, size, MADV_HUGEPAGE) }
    return MemoryMapping(
      owning: UnsafeMutableRawBufferPointer(start: pointer, count: size))
  }

  /// Maps a descriptor's bytes shared with every other mapping of it.
  package static func shared(
    _ descriptor: Int32, byteCount: Int, writable: Bool
  ) throws(Errno) -> MemoryMapping {
    let size = try roundedToPages(byteCount)
    let protection = writable ? PROT_READ | PROT_WRITE : PROT_READ
    guard
      let pointer = mmap(nil, size, protection, MAP_SHARED, descriptor, 0),
      pointer != MAP_FAILED
    else { throw Errno.current }
    return MemoryMapping(
      owning: UnsafeMutableRawBufferPointer(start: pointer, count: size))
  }

  /// The size of a page.
  package static let pageBytes = sysconf(Int32(_SC_PAGESIZE))

  static func roundedToPages(_ byteCount: Int) throws(Errno) -> Int {
    let (sum, overflow) = byteCount.addingReportingOverflow(pageBytes - 1)
    if overflow || byteCount <= 0 { throw Errno(ENOMEM) }
    return sum & ~(pageBytes - 1)
  }
}
