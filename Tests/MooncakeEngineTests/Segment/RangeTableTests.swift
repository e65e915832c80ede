import MooncakeEngine
import Testing

struct RangeTableTests {
  private static let both: Access = [.remoteRead, .remoteWrite]

  private static func table(_ buffers: [(UInt64, UInt64, Access)]) -> RangeTable {
    RangeTable(buffers.map { RemoteBuffer(address: $0.0, length: $0.1, access: $0.2) })
  }

  @Test func edges() {
    let table = Self.table([(1000, 100, Self.both), (1100, 50, Self.both), (2000, 1, Self.both)])
    for (address, length) in [(1000, 1), (1000, 100), (1099, 1), (1100, 50), (1149, 1), (2000, 1)] {
      #expect(
        table.check(UInt64(address), UInt64(length), .remoteRead) == .allowed,
        "\(length) at \(address)")
    }
    for (address, length) in [
      (999, 1), (999, 2), (1000, 101), (1099, 2), (1050, 100), (1150, 1), (1999, 1), (1999, 2),
      (2000, 2), (2001, 1), (0, 1), (1000, 0), (1050, 0),
    ] {
      #expect(
        table.check(UInt64(address), UInt64(length), .remoteRead) == .notRegistered,
        "\(length) at \(address)")
    }
  }

  @Test func nothingRegistered() {
    let table = Self.table([])
    for value: UInt64 in [0, 1, .max] {
      #expect(table.check(value, 1, .remoteRead) == .notRegistered)
      #expect(table.check(1, value, .remoteWrite) == .notRegistered)
    }
  }

  @Test func rights() {
    let table = Self.table([
      (100, 10, .remoteRead), (200, 10, .remoteWrite), (300, 10, .local), (400, 10, Self.both),
    ])
    let verdicts: [(UInt64, Access, RangeTable.Verdict)] = [
      (100, .remoteRead, .allowed), (100, .remoteWrite, .accessDenied),
      (200, .remoteRead, .accessDenied), (200, .remoteWrite, .allowed),
      (300, .remoteRead, .accessDenied), (300, .remoteWrite, .accessDenied),
      (400, .remoteRead, .allowed), (400, .remoteWrite, .allowed),
    ]
    for (address, right, verdict) in verdicts {
      #expect(table.check(address, 10, right) == verdict, "\(address)")
      #expect(table.check(address, 11, right) == .notRegistered)
    }
    #expect(Opcode.read.requiredAccess == .remoteRead)
    #expect(Opcode.write.requiredAccess == .remoteWrite)
  }

  /// Arithmetic on foreign numbers never wraps around into a buffer.
  @Test func overflow() {
    let last = UInt64.max - 9
    let table = Self.table([(1, 100, Self.both), (last, 9, Self.both)])
    #expect(table.check(last, 9, .remoteRead) == .allowed)
    for (address, length): (UInt64, UInt64) in [
      (last, 10), (last, .max), (.max, 1), (.max, .max), (1, .max), (50, .max - 20), (50, 0 &- 40),
      (2, UInt64.max), (last + 8, 2), (last + 9, 1),
    ] {
      #expect(
        table.check(address, length, .remoteRead) == .notRegistered, "\(length) at \(address)")
    }
  }

  /// Compared with the plain definition, for every range of a small space.
  @Test func exhaustive() {
    let buffers: [(UInt64, UInt64, Access)] = [
      (3, 2, Self.both), (5, 4, .remoteRead), (10, 1, .remoteWrite), (12, 5, Self.both),
    ]
    let table = Self.table(buffers)
    for address in UInt64(0)..<20 {
      for length in UInt64(0)..<20 {
        for right in [Access.remoteRead, .remoteWrite] {
          let holder = buffers.first {
            length > 0 && $0.0 <= address && address + length <= $0.0 + $0.1
          }
          let expected: RangeTable.Verdict =
            holder.map { $0.2.contains(right) ? .allowed : .accessDenied } ?? .notRegistered
          #expect(table.check(address, length, right) == expected, "\(length) at \(address)")
        }
      }
    }
  }
}
