import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

struct BufferTableTests {
  private static func buffer(_ address: UInt64, _ length: UInt64) -> BufferTable.Buffer {
    BufferTable.Buffer(
      range: RemoteBuffer(address: address, length: length, access: .remoteRead),
      location: "cpu:0")
  }

  private static func insert(_ table: BufferTable, _ ranges: (UInt64, UInt64)...) -> MooncakeError
    .Code?
  {
    failureCode { () throws(MooncakeError) in
      try table.insert(ranges.map { buffer($0.0, $0.1) })
    }
  }

  @Test func overlaps() {
    let table = BufferTable()
    #expect(Self.insert(table, (1000, 100)) == nil)
    for (address, length) in [(1000, 100), (999, 2), (1099, 1), (1099, 5), (1050, 1), (900, 500)] {
      #expect(
        Self.insert(table, (UInt64(address), UInt64(length))) == .overlap, "\(length) at \(address)"
      )
    }
    #expect(Self.insert(table, (900, 100)) == nil)
    #expect(Self.insert(table, (1100, 1)) == nil)
    #expect(table.buffers.map(\.range.address) == [900, 1000, 1100])
    #expect(table.snapshot.buffers == table.buffers.map(\.range))
  }

  @Test func allOrNone() {
    let table = BufferTable()
    #expect(Self.insert(table, (5000, 10)) == nil)
    let version = table.version
    #expect(Self.insert(table, (1000, 10), (2000, 10), (5009, 10)) == .overlap)
    #expect(Self.insert(table, (1000, 10), (1005, 10)) == .overlap)
    #expect(Self.insert(table, (1000, 10), (1000, 10)) == .overlap)
    #expect(Self.insert(table, (1000, 10), (2000, 0)) == .invalidArgument)
    #expect(Self.insert(table, (1000, 10), (0, 10)) == .invalidArgument)
    #expect(Self.insert(table, (1000, 10), (.max - 5, 10)) == .invalidArgument)
    #expect(Self.insert(table, (1000, .max)) == .invalidArgument)
    #expect(Self.insert(table, (1000, 1 << 63)) == .invalidArgument)
    #expect(table.version == version && table.buffers.count == 1)
    #expect(Self.insert(table, (3000, 10), (1000, 10), (2000, 10)) == nil)
    #expect(table.version != version)
    #expect(table.buffers.map(\.range.address) == [1000, 2000, 3000, 5000])
    #expect(Self.insert(table) == nil)
  }

  @Test func removal() {
    let table = BufferTable()
    _ = Self.insert(table, (1000, 10), (2000, 10), (3000, 10))
    let version = table.version
    #expect(table.remove([1001, 999, 0, .max]).isEmpty)
    #expect(table.remove([]).isEmpty)
    #expect(table.version == version)
    #expect(table.remove([3000, 7, 1000, 1000]).map(\.range.address) == [1000, 3000])
    #expect(table.version != version)
    #expect(table.snapshot.check(1000, 10, .remoteRead) == .notRegistered)
    #expect(table.snapshot.check(2000, 10, .remoteRead) == .allowed)
    #expect(table.remove([2000]).count == 1)
    #expect(table.snapshot.buffers.isEmpty)
    #expect(Self.insert(table, (1500, 1000)) == nil)
  }

  /// A snapshot held by a reader does not change.
  @Test func snapshotsAreImmutable() {
    let table = BufferTable()
    _ = Self.insert(table, (1000, 10))
    let old = table.snapshot
    _ = table.remove([1000])
    _ = Self.insert(table, (1005, 10))
    #expect(old.check(1000, 10, .remoteRead) == .allowed)
    #expect(old.check(1005, 10, .remoteRead) == .notRegistered)
  }

  /// Single inserts and removals against batches of the same.
  @Test func randomOrder() throws {
    let table = BufferTable()
    var generator = SeededRandom(seed: 3)
    let addresses = (1...500).map { UInt64($0) * 100 }
    for address in addresses.shuffled(using: &generator) {
      try table.insert([Self.buffer(address, 100)])
    }
    #expect(table.buffers.map(\.range.address) == addresses)
    for address in addresses.shuffled(using: &generator).prefix(400) {
      #expect(table.remove([address]).map(\.range.address) == [address])
    }
    #expect(table.buffers.count == 100)
    let left = table.buffers.map(\.range.address)
    #expect(left == left.sorted())
    #expect(table.snapshot.buffers.map(\.address) == left)
  }

  @Test func threads() throws {
    let table = BufferTable()
    let complaints = Complaints()
    try onThreads(4) { index in
      let base = UInt64(index + 1) << 32
      for round in 0..<300 {
        let address = base + UInt64(round % 10) * 4096
        complaints.require(Self.insert(table, (address, 4096)) == nil, "insert")
        complaints.require(
          table.snapshot.check(address, 4096, .remoteRead) == .allowed, "not visible")
        complaints.require(table.remove([address]).count == 1, "remove")
        complaints.require(
          table.snapshot.check(address, 1, .remoteRead) == .notRegistered, "still visible")
      }
    }
    #expect(table.buffers.isEmpty)
    #expect(complaints.all.isEmpty, "\(complaints.all.prefix(3))")
  }
}
