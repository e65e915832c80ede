import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem

/// A receive buffer whose contents the kernel can scatter into registered memory.
///
/// One receive call brings many small writes, each for another address. Plain stores would crash
/// the process if the host has unmapped or protected memory that it registered. When the data is
/// read from a memory file instead, the kernel does the stores and returns an error code for such
/// memory. Where a sandbox or a limit of file sizes forbids memory files, the data goes through a
/// pipe.
package struct ScatterBuffer: ~Copyable {
  private let input: Input
  private let vectors: UnsafeMutablePointer<iovec>
  private let junk: UnsafeMutableRawPointer
  package let address: UnsafeMutableRawPointer
  private var vectorCount = 0
  private var start = 0
  private var end = 0

  /// Where bytes are received, and what the kernel reads them from.
  private struct Input: ~Copyable {
    let mapping: MemoryMapping
    /// The buffer's file, or the read end of the pipe.
    let reader: FileDescriptor
    /// Owned by `writer`; -1 without a pipe.
    let writerNumber: Int32
    let writer: FileDescriptor?
  }

  private static let vectorLimit = 256
  private static let junkBytes = 4096

  package static let byteCount = 256 << 10

  /// `usesPipe` lets tests act as if there were no memory files.
  package init(usesPipe: Bool = false) throws(Errno) {
    input = try Self.makeInput(usesPipe: usesPipe)
    address = input.mapping.address
    junk = .allocate(byteCount: Self.junkBytes, alignment: 64)
    vectors = .allocate(capacity: Self.vectorLimit)
  }

  private static func makeInput(usesPipe: Bool) throws(Errno) -> Input {
    if !usesPipe {
      do throws(Errno) { return try makeFile() } catch {
        Log.info("tcp server: no memory file to receive into: \(error); small writes use a pipe")
      }
    }
    var ends: [Int32] = [0, 0]
    _ = try retryingInterrupts("pipe2") { pipe2(&ends, O_CLOEXEC | O_NONBLOCK) }
    for index in 0..<2 {
      do throws(Errno) { ends[index] = try FileDescriptor.aboveStandard(ends[index]) } catch {
        close(ends[1 - index])
        throw error
      }
    }
    let reader = FileDescriptor(owning: ends[0])
    let writer = FileDescriptor(owning: ends[1])
    let writerNumber = writer.rawValue
    return Input(
      mapping: try .anonymous(byteCount: byteCount), reader: reader,
      writerNumber: writerNumber, writer: writer)
  }

  deinit {
    vectors.deallocate()
    junk.deallocate()
  }

  /// Makes a memory file, and tries whether it can be read with `preadv`.
  private static func makeFile() throws(Errno) -> Input {
    let file = try FileDescriptor(
      opening: { memfd_create("mooncake-input", UInt32(MFD_CLOEXEC)) }, call: "memfd_create")
    let descriptor = file.rawValue
    _ = try withoutWriteSignals { () throws(Errno) in
      try retryingInterrupts("ftruncate") { ftruncate(descriptor, Self.byteCount) }
    }
    var byte: UInt8 = 0
    _ = try withUnsafeMutableBytes(of: &byte) { bytes throws(Errno) in
      var vector = iovec(iov_base: bytes.baseAddress, iov_len: 1)
      return try retryingInterrupts("preadv") { preadv(descriptor, &vector, 1, 0) }
    }
    return Input(
      mapping: try .shared(descriptor, byteCount: Self.byteCount, writable: true), reader: file,
      writerNumber: -1, writer: nil)
  }

  /// Notes that the `count` bytes at `offset` belong at `target`; offsets grow from call to call.
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

  /// Stores everything noted. Throws if some of the memory cannot be written.
  package mutating func flush() throws(Errno) {
    if vectorCount == 0 { return }
    let expected = end - start
    let count = vectorCount
    vectorCount = 0
    if input.writerNumber >= 0 { return try move(expected, count) }
    let stored = try retryingInterrupts {
      preadv(input.reader.rawValue, vectors, Int32(count), off_t(start))
    }
    // It is short only if a page of the target cannot be written.
    if stored != expected { throw Errno(EFAULT) }
  }

  /// Fills the vectors through the pipe, which changes them.
  private func move(_ byteCount: Int, _ vectorCount: Int) throws(Errno) {
    var done = 0
    var index = 0
    while done < byteCount {
      // At most as much as the pipe holds.
      var held = try retryingInterrupts {
        write(input.writerNumber, address + start + done, byteCount - done)
      }
      done += held
      while held > 0 {
        let stored = readv(input.reader.rawValue, vectors + index, Int32(vectorCount - index))
        if stored == -1 && errno == EINTR { continue }
        if stored <= 0 {
          let error = Errno.current
          // The pipe must be empty for the next flush.
          while read(input.reader.rawValue, junk, Self.junkBytes) > 0 {}
          throw error
        }
        held -= stored
        index = advance(index, by: stored)
      }
    }
  }

  /// Takes the stored bytes off the vectors; returns the first one that is not full.
  private func advance(_ first: Int, by stored: Int) -> Int {
    var index = first
    var left = stored
    while left > 0 {
      let part = min(left, vectors[index].iov_len)
      vectors[index].iov_base = vectors[index].iov_base + part
      vectors[index].iov_len -= part
      left -= part
      if vectors[index].iov_len == 0 { index += 1 }
    }
    return index
  }
}
