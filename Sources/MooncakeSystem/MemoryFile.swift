import CLinux
import Glibc

/// Memory behind a descriptor, which can be passed to other processes. Its size is sealed, so no
/// holder can take pages away from the others.
package struct MemoryFile: ~Copyable, Sendable {
  package let descriptor: FileDescriptor
  package let byteCount: Int

  private static let sizeSeals = F_SEAL_SHRINK | F_SEAL_GROW

  /// Makes zeroed memory of a whole number of pages.
  package init(name: String, byteCount: Int) throws(Errno) {
    let size = try MemoryMapping.roundedToPages(byteCount)
    let file = try FileDescriptor(
      opening: { memfd_create(name, UInt32(MFD_CLOEXEC) | UInt32(MFD_ALLOW_SEALING)) },
      call: "memfd_create")
    let number = file.rawValue
    // The file size limit applies to memory files too.
    _ = try withoutWriteSignals { () throws(Errno) in
      try retryingInterrupts("ftruncate") { ftruncate(number, size) }
    }
    _ = try retryingInterrupts("fcntl") { fcntl(number, F_ADD_SEALS, Self.sizeSeals) }
    descriptor = file
    self.byteCount = size
  }

  /// Takes a received descriptor whose size is sealed and at least `byteCount`, so touching its
  /// pages cannot raise SIGBUS.
  package init(
    receiving descriptor: consuming FileDescriptor, byteCount: Int
  ) throws(Errno) {
    let seals = fcntl(descriptor.rawValue, F_GET_SEALS)
    if seals == -1 { throw Errno.current }
    var status = stat()
    if fstat(descriptor.rawValue, &status) != 0 { throw Errno.current }
    guard seals & F_SEAL_SHRINK != 0, byteCount > 0, status.st_size >= byteCount else {
      throw Errno(EPERM)
    }
    self.descriptor = descriptor
    self.byteCount = byteCount
  }

  /// Maps the memory, shared with every other mapping of it.
  package func map(writable: Bool) throws(Errno) -> MemoryMapping {
    let mapping = try MemoryMapping.shared(
      descriptor.rawValue, byteCount: byteCount, writable: writable)
    if byteCount >= 2 << 20 { madvise(mapping.address, byteCount, MADV_HUGEPAGE) }
    return mapping
  }

  /// Forbids further writable mappings and changes of the seals; existing mappings stay.
  package func sealAgainstWriters() throws(Errno) {
    _ = try retryingInterrupts("fcntl") {
      fcntl(descriptor.rawValue, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)
    }
  }

  /// A read-only descriptor of the same memory.
  package func readOnlyDescriptor() throws(Errno) -> FileDescriptor {
    try FileDescriptor.open("/proc/self/fd/\(descriptor.rawValue)", flags: O_RDONLY)
  }
}
