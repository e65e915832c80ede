import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

struct ScatterBufferTests {
  /// From a memory file, and through a pipe in case a sandbox forbids those.
  @Test(arguments: [false, true])
  func storesPiecesWhereTheyBelong(_ usesPipe: Bool) throws {
    var buffer = try ScatterBuffer(usesPipe: usesPipe)
    let input = UnsafeMutableRawBufferPointer(
      start: buffer.address, count: ScatterBuffer.byteCount)
    let pattern = Pattern(seed: 1)
    pattern.fill(input)
    let target = GuardedMemory(ScatterBuffer.byteCount)
    // Pieces and gaps of many sizes, more than one system call takes.
    var pieces: [(offset: Int, count: Int)] = []
    var offset = 0
    var generator = SeededRandom(seed: 5)
    while offset < ScatterBuffer.byteCount - 300 {
      let count = Int.random(in: 1...200, using: &generator)
      pieces.append((offset, count))
      offset += count + [0, 24, 40, 24, 9000][Int.random(in: 0..<5, using: &generator)]
    }
    for piece in pieces where piece.offset + piece.count <= ScatterBuffer.byteCount {
      try buffer.add(
        offset: piece.offset, count: piece.count, target: target.address + piece.offset)
    }
    try buffer.flush()
    var end = 0
    for piece in pieces where piece.offset + piece.count <= ScatterBuffer.byteCount {
      let stored = UnsafeRawBufferPointer(start: target.address + piece.offset, count: piece.count)
      #expect(pattern.matches(stored, at: piece.offset), "at \(piece.offset)")
      let gap = UnsafeRawBufferPointer(start: target.address + end, count: piece.offset - end)
      #expect(gap.allSatisfy { $0 == 0 }, "before \(piece.offset)")
      end = piece.offset + piece.count
    }
    #expect(target.areGuardsIntact)
    try buffer.flush()
  }

  /// Unmapped memory is an error and does not kill the process.
  @Test(arguments: [false, true])
  func memoryThatIsNotThere(_ usesPipe: Bool) throws {
    var buffer = try ScatterBuffer(usesPipe: usesPipe)
    let good = GuardedMemory(64)
    let hole = try MemoryMapping.anonymous(byteCount: 8192)
    for protection in [PROT_NONE, PROT_READ] {
      mprotect(hole.address, 8192, protection)
      try buffer.add(offset: 0, count: 32, target: good.address)
      try buffer.add(offset: 56, count: 100, target: hole.address)
      #expect(throws: Errno(EFAULT)) { try buffer.flush() }
      // The failure does not persist.
      try buffer.flush()
      memset(buffer.address, 0x7E, 64)
      try buffer.add(offset: 0, count: 64, target: good.address)
      try buffer.flush()
      #expect(good.holdsOnly(0x7E))
    }
    #expect(good.areGuardsIntact)
  }
}
