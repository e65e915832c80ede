import MooncakeEngine

/// Virtual memory comes in cells, each of which holds one number: requests have the sizes of real
/// ones, and moving them costs nothing.
enum Cells {
  static let bytes = 64 << 10
  static let localBase: UInt64 = 0x10_0000_0000
  static let remoteBase: UInt64 = 0x20_0000_0000

  static func remoteAddress(_ cell: Int) -> UInt64 { remoteBase + UInt64(cell * bytes) }

  static func remote(_ address: UInt64, _ byteCount: Int) -> Range<Int> {
    let first = Int(address - remoteBase) / bytes
    return first..<first + byteCount / bytes
  }
}

/// One life of a peer: its memory, and everything that was ever stored there.
final class FakeProcess: @unchecked Sendable {
  // Unchecked: a simulation has one thread.
  /// What was stored in a cell, and when.
  struct Store {
    let order: Int
    let value: UInt64
    /// The number of the request; -1 for the process itself.
    let request: Int
  }

  static let cellCount = 64

  let incarnation: UInt64
  let gate = WriteGate()
  private(set) var stores: [[Store]]
  /// Cells that peers may use.
  var buffers: [Range<Int>]
  var isAlive = true
  /// Unanswered writes of broken connections that may still land.
  var unfenced: [FakeFlight] = []

  init(incarnation: UInt64, buffers: [Range<Int>]) {
    self.incarnation = incarnation
    self.buffers = buffers
    stores = (0..<Self.cellCount).map {
      [Store(order: 0, value: incarnation << 40 | UInt64($0) << 20, request: -1)]
    }
  }

  func allows(_ cells: Range<Int>) -> Bool {
    buffers.contains { $0.lowerBound <= cells.lowerBound && cells.upperBound <= $0.upperBound }
  }

  func values(_ cells: Range<Int>) -> [UInt64] { cells.map { stores[$0].last!.value } }

  func store(_ value: UInt64, in cell: Int, of request: Int, order: Int) {
    stores[cell].append(Store(order: order, value: value, request: request))
  }

  func describe(_ name: String) -> SegmentDescriptor {
    SegmentDescriptor(
      name: name, incarnation: incarnation,
      buffers: buffers.map {
        RemoteBuffer(
          address: Cells.remoteAddress($0.lowerBound), length: UInt64($0.count * Cells.bytes),
          access: [.remoteRead, .remoteWrite])
      })
  }
}

/// A slice that is under way.
final class FakeFlight: @unchecked Sendable {
  // Unchecked: a simulation has one thread.
  /// nil once the path no longer answers for it.
  var slice: SlicePointer?
  let request: Int
  let opcode: Opcode
  let local: Range<Int>
  let remote: Range<Int>
  /// What a write carries or a read has fetched.
  var values: [UInt64]
  /// Nothing of it happens any more.
  var isDropped = false
  var hasLanded = false
  /// Whether its range stands in the gate.
  var isGated = false

  init(
    _ slice: SlicePointer, request: Int, local: Range<Int>, remote: Range<Int>, values: [UInt64]
  ) {
    self.slice = slice
    self.request = request
    opcode = slice.pointee.opcode
    self.local = local
    self.remote = remote
    self.values = values
  }

  var addresses: Range<UInt64> {
    Cells.remoteAddress(remote.lowerBound)..<Cells.remoteAddress(remote.upperBound)
  }
}
