/// Bytes that depend on a seed, a generation and their offset, so that missing, misplaced, stale
/// and torn blocks are noticed. `bench target --pattern` fills in generation 0.
struct BlockPattern {
  let seed: UInt64

  @inline(__always)
  private func word(_ index: UInt64, _ base: UInt64) -> UInt64 {
    var value = (index &+ base) &* 0x9E37_79B9_7F4A_7C15
    value ^= value >> 29
    value = value &* 0xBF58_476D_1CE4_E5B9
    return (value ^ (value >> 32)).littleEndian
  }

  private func base(_ generation: UInt32) -> UInt64 {
    seed &* 0xD1B5_4A32_D192_ED03 &+ UInt64(generation) &* 0x2545_F491_4F6C_DD1D
  }

  /// Fills memory with `[offset, offset + count)` of the pattern.
  func fill(_ memory: UnsafeMutableRawPointer, count: Int, offset: UInt64, generation: UInt32) {
    let base = base(generation)
    var position = 0
    while position < count {
      let at = offset &+ UInt64(position)
      let value = word(at >> 3, base)
      if at & 7 == 0 && count - position >= 8 {
        memory.storeBytes(of: value, toByteOffset: position, as: UInt64.self)
        position += 8
      } else {
        memory.storeBytes(of: byte(of: value, at), toByteOffset: position, as: UInt8.self)
        position += 1
      }
    }
  }

  /// The first position where memory differs from the pattern, with the byte expected there.
  func mismatch(
    in memory: UnsafeRawPointer, count: Int, offset: UInt64, generation: UInt32
  ) -> (position: Int, expected: UInt8)? {
    let base = base(generation)
    var position = 0
    while position < count {
      let at = offset &+ UInt64(position)
      let value = word(at >> 3, base)
      if at & 7 == 0 && count - position >= 8
        && memory.loadUnaligned(fromByteOffset: position, as: UInt64.self) == value
      {
        position += 8
        continue
      }
      let expected = byte(of: value, at)
      if memory.load(fromByteOffset: position, as: UInt8.self) != expected {
        return (position, expected)
      }
      position += 1
    }
    return nil
  }

  @inline(__always)
  private func byte(of word: UInt64, _ offset: UInt64) -> UInt8 {
    UInt8(truncatingIfNeeded: UInt64(littleEndian: word) >> ((offset & 7) << 3))
  }
}

/// Visits the numbers below `count` in a scattered order, each once per round.
struct ScatteredOrder {
  private let count: UInt64
  private let mask: UInt64
  private let shift: UInt64

  init(count: UInt64) {
    self.count = count
    let bits = UInt64(64 - max(count - 1, 1).leadingZeroBitCount)
    mask = bits >= 64 ? .max : (1 << bits) - 1
    shift = bits / 2 + 1
  }

  /// The number at a position of the order. `position` wraps around at `count`.
  @inline(__always)
  func callAsFunction(_ position: UInt64) -> UInt64 {
    // A bijection on the next power of two; applying it again to values outside the range makes it
    // a bijection on the range.
    var value = position % count
    repeat {
      value = (value &* 0xD134_2543_DE82_EF95 &+ 0x1405_7B7E_F767_814F) & mask
      value ^= value >> shift
      value = (value &* 0xAF25_1AF3_B0F0_25B5) & mask
    } while value >= count
    return value
  }
}
