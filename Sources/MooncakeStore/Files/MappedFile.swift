import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem

/// A file whose bytes are a buffer of a payload, in memory without a second copy.
package final class MappedFile: Sendable {
  /// What changes when somebody writes into a file or puts another in its place.
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

  package let path: String
  package let size: UInt64
  package let isExecutable: Bool
  /// None for an empty file.
  private let memory: FileMemory?
  private let state: State

  private static let chunkBytes = 256 << 10

  /// Maps an existing file for reading.
  package init(reading path: String) throws(EngineError) {
    // Without waiting, should it have become a pipe meanwhile.
    let file = try Self.open(path)
    let status = try Self.status(file, path)
    guard status.st_mode & S_IFMT == S_IFREG else { throw Self.changed(path) }
    self.path = path
    state = State(status)
    size = UInt64(status.st_size)
    isExecutable = status.st_mode & S_IXUSR != 0
    memory = size == 0 ? nil : try FileMemory(file, size, path, writable: false)
  }

  /// Takes over a file that has been written through a mapping.
  init(
    received path: String, size: UInt64, isExecutable: Bool, memory: FileMemory?
  ) throws(EngineError) {
    self.path = path
    self.size = size
    self.isExecutable = isExecutable
    self.memory = memory
    let file = try Self.open(path)
    state = State(try Self.status(file, path))
  }

  /// The file as a buffer; nil for an empty one.
  package var buffer: PayloadBuffer? {
    memory.map { PayloadBuffer(address: $0.address, length: size) }
  }

  /// Throws if the file is not what it was when it was mapped.
  package func check() throws(EngineError) {
    var status = stat()
    if stat(path, &status) != 0 || State(status) != state { throw Self.changed(path) }
  }

  /// The digest of some bytes. They are read, not touched in memory: a file that is cut short in
  /// between makes an error instead of ending the process.
  package func digest(offset: UInt64, length: UInt64) throws(EngineError) -> Digest {
    let file = try Self.open(path)
    if State(try Self.status(file, path)) != state { throw Self.changed(path) }
    posix_fadvise(file.rawValue, Int(offset), Int(length), POSIX_FADV_SEQUENTIAL)
    let chunk = UnsafeMutableRawBufferPointer.allocate(byteCount: Self.chunkBytes, alignment: 64)
    defer { chunk.deallocate() }
    let stream = DigestStream()
    var done: UInt64 = 0
    while done < length {
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

  private static func open(_ path: String) throws(EngineError) -> FileDescriptor {
    do throws(Errno) { return try .open(path, flags: O_RDONLY | O_NONBLOCK) } catch {
      throw FileFailure.error(path, error)
    }
  }

  private static func status(
    _ file: borrowing FileDescriptor, _ path: String
  ) throws(EngineError) -> stat {
    var status = stat()
    if fstat(file.rawValue, &status) != 0 { throw FileFailure.error(path, Errno.current) }
    return status
  }

  private static func changed(_ path: String) -> EngineError {
    EngineError(
      .digestMismatch,
      "\(path) has changed since it was published: publish files that nobody writes, and publish "
        + "again after a change")
  }
}

/// The bytes of a file in memory, as long as somebody refers to them.
final class FileMemory: Sendable {
  private let mapping: MemoryMapping

  init(
    _ file: borrowing FileDescriptor, _ size: UInt64, _ path: String, writable: Bool
  ) throws(EngineError) {
    do throws(Errno) {
      guard let count = Int(exactly: size) else { throw Errno(ENOMEM) }
      mapping = try .shared(file.rawValue, byteCount: count, writable: writable)
    } catch {
      throw FileFailure.error(path, error, "mapping \(size) bytes of it")
    }
  }

  var address: UnsafeMutableRawPointer { mapping.address }
}
