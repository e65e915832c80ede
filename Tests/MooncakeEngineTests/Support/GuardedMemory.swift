import CLinux
import Glibc
import MooncakeSystem
import Synchronization

/// Bytes that depend on their place in a stream: a block of prime length, so that neither pages nor
/// chunks of a power of two line up with its repetitions.
struct Pattern: Sendable {
  private static let blockBytes = 65_521
  private static let blocks = Lock<[UInt8: [UInt8]]>([:])
  private let block: [UInt8]

  init(seed: UInt8) {
    block = Self.blocks.withLock { blocks in
      if let block = blocks[seed] { return block }
      let block = Self.makeBlock(seed)
      blocks[seed] = block
      return block
    }
  }

  private static func makeBlock(_ seed: UInt8) -> [UInt8] {
    var state = UInt32(seed) &* 2_654_435_761 &+ 12_345
    return (0..<blockBytes).map { _ in
      state = state &* 1_664_525 &+ 1_013_904_223
      return UInt8(truncatingIfNeeded: state >> 24)
    }
  }

  /// Writes the bytes of the stream from `position` on.
  func fill(_ bytes: UnsafeMutableRawBufferPointer, at position: Int = 0) {
    walk(bytes.count, position) { part, offset, block in
      memcpy(bytes.baseAddress! + offset, block, part)
      return true
    }
  }

  /// Whether the bytes are those of the stream from `position` on.
  func matches(_ bytes: UnsafeRawBufferPointer, at position: Int = 0) -> Bool {
    walk(bytes.count, position) { part, offset, block in
      memcmp(bytes.baseAddress! + offset, block, part) == 0
    }
  }

  @discardableResult
  private func walk(
    _ count: Int, _ position: Int, _ body: (Int, Int, UnsafeRawPointer) -> Bool
  ) -> Bool {
    block.withUnsafeBytes { block in
      var offset = 0
      while offset < count {
        let start = (position + offset) % Self.blockBytes
        let part = min(count - offset, Self.blockBytes - start)
        if !body(part, offset, block.baseAddress! + start) { return false }
        offset += part
      }
      return true
    }
  }
}

/// Memory with guard bytes on both sides, followed by an inaccessible page.
final class GuardedMemory: @unchecked Sendable {
  // Unchecked: tests order their accesses by transfers and joins.
  let count: Int
  private let base: UnsafeMutableRawPointer
  private let guardedBytes: Int
  private let mappedBytes: Int
  private let offset: Int

  private static let guardBytes = 4096
  private static let guardByte: UInt8 = 0xA5

  /// `alignment`: offset of the first byte within its page.
  init(_ count: Int, alignment: Int = 0) {
    self.count = count
    offset = Self.guardBytes + alignment
    let page = MemoryMapping.pageBytes
    guardedBytes = (offset + count + Self.guardBytes + page - 1) / page * page
    mappedBytes = guardedBytes + page
    base = mmap(nil, mappedBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)!
    precondition(base != MAP_FAILED)
    memset(base, Int32(Self.guardByte), guardedBytes)
    memset(base + offset, 0, count)
    mprotect(base + guardedBytes, page, PROT_NONE)
  }

  deinit { munmap(base, mappedBytes) }

  var address: UnsafeMutableRawPointer { base + offset }
  var bytes: UnsafeMutableRawBufferPointer { .init(start: address, count: count) }

  func fill(_ byte: UInt8) { memset(address, Int32(byte), count) }

  func fill(_ pattern: Pattern) { pattern.fill(bytes) }

  func matches(_ pattern: Pattern) -> Bool { pattern.matches(UnsafeRawBufferPointer(bytes)) }

  /// Whether every byte has this value.
  func holdsOnly(_ byte: UInt8) -> Bool { Self.isUniform(address, count, byte) }

  /// Whether no byte has this value.
  func lacks(_ byte: UInt8) -> Bool { memchr(address, Int32(byte), count) == nil }

  /// Whether nothing was written next to the memory.
  var areGuardsIntact: Bool {
    Self.isUniform(base, offset, Self.guardByte)
      && Self.isUniform(address + count, guardedBytes - offset - count, Self.guardByte)
  }

  private static func isUniform(
    _ start: UnsafeMutableRawPointer, _ count: Int, _ byte: UInt8
  ) -> Bool {
    if count == 0 { return true }
    // Equal to itself one byte further, so all bytes equal the first.
    return start.load(as: UInt8.self) == byte && memcmp(start, start + 1, count - 1) == 0
  }
}
