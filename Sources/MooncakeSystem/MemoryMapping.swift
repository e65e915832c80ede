import CLinux
import Glibc

/// Owns a range of mapped memory.
package struct MemoryMapping: ~Copyable, @unchecked Sendable {
  // Unchecked: the owner decides which threads touch the bytes.
  package let bytes: UnsafeMutableRawBufferPointer

  package var address: UnsafeMutableRawPointer { bytes.baseAddress! }
  package var count: Int { bytes.count }

  /// Takes ownership of a range that will be unmapped with `munmap`.
  package init(owning bytes: UnsafeMutableRawBufferPointer) { self.bytes = bytes }

  /// Gives the range to the caller, who must unmap it.
  package consuming func release() -> UnsafeMutableRawBufferPointer {
    let bytes = self.bytes
    discard self
    return bytes
  }

  deinit { munmap(bytes.baseAddress!, bytes.count) }

  /// Maps zeroed private memory, a whole number of pages; asks for huge pages where they help.
  package static func anonymous(byteCount: Int) throws(Errno) -> MemoryMapping {
    let size = try roundedToPages(byteCount)
    guard
      let pointer = mmap(
        nil, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
      pointer != MAP_FAILED
    else { throw Errno.current }
    if size >= hugePageBytes { madvise(pointer, size, MADV_HUGEPAGE) }
    return MemoryMapping(
      owning: UnsafeMutableRawBufferPointer(start: pointer, count: size))
  }

  /// Maps a descriptor's bytes, shared with its other mappings; large ones are aligned for huge
  /// pages.
  package static func shared(
    _ descriptor: Int32, byteCount: Int, writable: Bool
  ) throws(Errno) -> MemoryMapping {
    let size = try roundedToPages(byteCount)
    let protection = writable ? PROT_READ | PROT_WRITE : PROT_READ
    let place = size >= hugePageBytes ? try reserveAligned(size) : nil
    guard
      let pointer = mmap(
        place, size, protection, place == nil ? MAP_SHARED : MAP_SHARED | MAP_FIXED, descriptor, 0),
      pointer != MAP_FAILED
    else {
      let error = Errno.current
      if let place { munmap(place, size) }
      throw error
    }
    return MemoryMapping(
      owning: UnsafeMutableRawBufferPointer(start: pointer, count: size))
  }

  /// Reserves addresses without memory, aligned to a huge page, for other mappings to be put over.
  package static func reserved(byteCount: Int) throws(Errno) -> MemoryMapping {
    let size = try roundedToPages(byteCount)
    let start = try reserveAligned(size)
    return MemoryMapping(owning: UnsafeMutableRawBufferPointer(start: start, count: size))
  }

  /// Reserves addresses for `size` bytes, aligned to a huge page.
  private static func reserveAligned(_ size: Int) throws(Errno) -> UnsafeMutableRawPointer {
    let (whole, overflow) = size.addingReportingOverflow(hugePageBytes)
    guard !overflow,
      let start = mmap(nil, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
      start != MAP_FAILED
    else { throw overflow ? Errno(ENOMEM) : Errno.current }
    let head = -Int(bitPattern: start) & (hugePageBytes - 1)
    if head > 0 { munmap(start, head) }
    munmap(start + head + size, hugePageBytes - head)
    return start + head
  }

  /// Makes pages not yet present come from near a NUMA node, if it has room.
  package func prefer(node: UInt32) throws(Errno) {
    if linux_prefer_node(address, count, node) != 0 { throw Errno.current }
  }

  /// Moves shared memory to huge pages now. The kernel alone does so only where `shmem_enabled`
  /// allows, and copies between small pages take up to twice as long.
  package func gatherHugePages() {
    if count < Self.hugePageBytes || Self.sharesHugePages { return }
    for offset in stride(from: 0, to: count, by: Self.hugePageBytes) {
      // Ranges without any page are not collapsed. The memory is new, so writing zero changes
      // nothing.
      (address + offset).storeBytes(of: 0, as: UInt8.self)
    }
    // Fails if memory is short or the kernel older than 6.1; the small pages then stay.
    madvise(address, count & ~(Self.hugePageBytes - 1), Self.madviseCollapse)
  }

  private static var sharesHugePages: Bool {
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    guard let file = try? FileDescriptor.open(path, flags: O_RDONLY) else { return true }
    var bytes = [UInt8](repeating: 0, count: 128)
    let length = read(file.rawValue, &bytes, bytes.count)
    let text = String(decoding: bytes.prefix(max(0, length)), as: UTF8.self)
    return !text.contains("[never]")
  }

  private static let hugePageBytes = 2 << 20
  private static let madviseCollapse: Int32 = 25

  /// The size of a page.
  package static let pageBytes = sysconf(Int32(_SC_PAGESIZE))

  static func roundedToPages(_ byteCount: Int) throws(Errno) -> Int {
    let (sum, overflow) = byteCount.addingReportingOverflow(pageBytes - 1)
    if overflow || byteCount <= 0 { throw Errno(ENOMEM) }
    return sum & ~(pageBytes - 1)
  }
}
