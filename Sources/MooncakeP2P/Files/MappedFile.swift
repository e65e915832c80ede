import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// A file whose bytes are a buffer of a payload, without a second copy in memory.
package final class MappedFile: Sendable {
  /// What changes when somebody writes the file or replaces it.
  private struct State: Equatable {
    var device: UInt64
    var number: UInt64
    var size: Int64
    var seconds: Int
    var nanoseconds: Int

    init(_ status: stat) {
      device = UInt64(status.st_dev)
      number = UInt64(status.st_ino)
      size = Int64(status.st_size)
      seconds = status.st_mtim.tv_sec
      nanoseconds = status.st_mtim.tv_nsec
    }
  }

  package let path: FilePath
  package let size: UInt64
  package let isExecutable: Bool
  /// nil for an empty file.
  package let buffer: PayloadBuffer?
  /// The mapping.
  private let arena: FileArena
  private let state: State

  /// Start of the registered memory that contains it and its neighbors; nil without any.
  var memoryAddress: UInt64? { arena.buffer.map { UInt64(UInt(bitPattern: $0.address)) } }

  private static let chunkBytes = 256 << 10

  /// Maps an existing file for reading; it must have the size of its place.
  init(reading path: FilePath, size: UInt64, in arena: FileArena, index: Int) throws(MooncakeError)
  {
    // Nonblocking, in case it has become a pipe.
    let file = try Self.open(path)
    let status = try Self.status(file, path)
    guard status.st_mode & S_IFMT == S_IFREG, UInt64(status.st_size) == size else {
      throw Self.changed(path)
    }
    self.path = path
    self.size = size
    self.arena = arena
    state = State(status)
    isExecutable = status.st_mode & S_IXUSR != 0
    if size == 0 {
      buffer = nil
    } else {
      buffer = PayloadBuffer(
        address: try arena.map(index, file, size, path, writable: false), length: size)
    }
  }

  /// Maps one existing file for reading.
  package convenience init(reading path: FilePath) throws(MooncakeError) {
    let size = UInt64(try Self.status(try Self.open(path), path).st_size)
    let arena = try FileArena(sizes: [size], "\(path)")
    try self.init(reading: path, size: size, in: arena, index: 0)
  }

  /// Takes over a file that was written through the arena and moved to its place.
  init(
    received path: FilePath, _ status: stat, isExecutable: Bool, in arena: FileArena, index: Int
  ) {
    self.path = path
    self.isExecutable = isExecutable
    self.arena = arena
    state = State(status)
    size = UInt64(status.st_size)
    buffer = arena.buffer(index, size)
  }

  /// Throws if the file has changed since it was mapped.
  package func check() throws(MooncakeError) {
    var status = stat()
    if path.withCString({ stat($0, &status) }) != 0 || State(status) != state {
      throw Self.changed(path)
    }
  }

  /// The digest of some bytes. They are read with system calls, not through the mapping: if the
  /// file is truncated meanwhile, that is an error instead of a fatal signal. `pause`, called now
  /// and then, may stop it by throwing.
  package func digest(
    offset: UInt64, length: UInt64, pause: () throws(MooncakeError) -> Void = {}
  ) throws(MooncakeError) -> Digest {
    let file = try Self.open(path)
    if State(try Self.status(file, path)) != state { throw Self.changed(path) }
    posix_fadvise(file.rawValue, Int(offset), Int(length), POSIX_FADV_SEQUENTIAL)
    let chunk = UnsafeMutableRawBufferPointer.allocate(byteCount: Self.chunkBytes, alignment: 64)
    defer { chunk.deallocate() }
    let stream = DigestStream()
    var done: UInt64 = 0
    while done < length {
      if done > 0 { try pause() }
      let wanted = Int(min(UInt64(chunk.count), length - done))
      let count: Int
      do throws(Errno) {
        count = try retryingInterrupts {
          pread(file.rawValue, chunk.baseAddress, wanted, off_t(offset + done))
        }
      } catch {
        throw FileFailure.error(path, error, "reading it")
      }
      if count == 0 { throw Self.changed(path) }
      stream.update(UnsafeRawBufferPointer(rebasing: chunk[..<count]))
      done += UInt64(count)
    }
    if State(try Self.status(file, path)) != state { throw Self.changed(path) }
    return stream.finish()
  }

  private static func open(_ path: FilePath) throws(MooncakeError) -> FileDescriptor {
    do throws(Errno) { return try .open(path, flags: O_RDONLY | O_NONBLOCK | O_NOCTTY) } catch {
      throw FileFailure.error(path, error)
    }
  }

  private static func status(
    _ file: borrowing FileDescriptor, _ path: FilePath
  ) throws(MooncakeError) -> stat {
    var status = stat()
    if fstat(file.rawValue, &status) != 0 { throw FileFailure.error(path, Errno.current) }
    return status
  }

  private static func changed(_ path: FilePath) -> MooncakeError {
    MooncakeError(
      .digestMismatch,
      "\(path) has changed since it was published: publish files that nobody writes, and publish "
        + "again after a change")
  }
}
