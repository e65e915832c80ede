import MooncakeBase
import MooncakeSystem
import Synchronization

/// The buffers registered with one engine.
package final class BufferTable: Sendable {
  /// A registered range with its location, access and place.
  package struct Buffer: Sendable {
    package var range: RemoteBuffer
    package var location: String
    /// Where it lies in memory that peers can map; nil for the host's own memory.
    package var place: SharedPlace?

    package init(range: RemoteBuffer, location: String, place: SharedPlace? = nil) {
      self.range = range
      self.location = location
      self.place = place
    }
  }

  /// A place in one of the engine's memory files.
  package struct SharedPlace: Sendable {
    package var memory: UInt32
    package var offset: UInt64
  }

  /// Most buffers of one engine; the descriptor that lists them must fit peers' message limits.
  package static let capacity = 1 << 20

  private struct State: Sendable {
    /// In order of address.
    var buffers: [Buffer] = []
    var table = RangeTable([])
  }

  private let state = Lock(State())
  /// Grows with every change; readers keep their snapshot, without locking, until then.
  private let versionWord = Atomic<UInt64>(1)

  package init() {}

  @inline(__always)
  package var version: UInt64 { versionWord.load(ordering: .acquiring) }

  /// The current set. Read `version` first: the snapshot is good until `version` changes.
  package var snapshot: RangeTable { state.withLock { $0.table } }

  package var buffers: [Buffer] { state.withLock { $0.buffers } }

  /// Makes readers look again, since something else that is published with the buffers has changed.
  package func noteChange() { versionWord.wrappingAdd(1, ordering: .releasing) }

  /// Adds all buffers or none.
  package func insert(_ new: [Buffer]) throws(MooncakeError) {
    for buffer in new { try Self.validate(buffer.range) }
    let conflict: MooncakeError? = state.withLock { state in
      if state.buffers.count + new.count > Self.capacity {
        return MooncakeError(.full, "an engine holds at most \(Self.capacity) buffers")
      }
      let conflict = new.count == 1 ? Self.insertOne(new[0], &state) : Self.merge(new, &state)
      if let conflict { return conflict }
      Self.publish(&state)
      versionWord.wrappingAdd(1, ordering: .releasing)
      return nil
    }
    if let conflict { throw conflict }
  }

  /// Sorts once, so that registering many buffers in one call stays nearly linear.
  private static func merge(_ new: [Buffer], _ state: inout State) -> MooncakeError? {
    let merged = (state.buffers + new).sorted { $0.range.address < $1.range.address }
    for (left, right) in zip(merged, merged.dropFirst()) {
      if let conflict = conflict(left, right) { return conflict }
    }
    state.buffers = merged
    return nil
  }

  /// Inserts without sorting, for many calls with one buffer each.
  private static func insertOne(_ new: Buffer, _ state: inout State) -> MooncakeError? {
    let index = position(of: new.range.address, in: state.buffers)
    if index > 0, let conflict = conflict(state.buffers[index - 1], new) { return conflict }
    if index < state.buffers.count, let conflict = conflict(new, state.buffers[index]) {
      return conflict
    }
    state.buffers.insert(new, at: index)
    return nil
  }

  private static func conflict(_ left: Buffer, _ right: Buffer) -> MooncakeError? {
    guard right.range.address - left.range.address < left.range.length else { return nil }
    return MooncakeError(
      .overlap,
      "\(describe(right.range)) overlaps the buffer \(describe(left.range)): "
        + "unregister that one first")
  }

  /// Index of the first buffer that begins at or after the address.
  private static func position(of address: UInt64, in buffers: [Buffer]) -> Int {
    var low = 0
    var high = buffers.count
    while low < high {
      let middle = (low + high) / 2
      if buffers[middle].range.address < address { low = middle + 1 } else { high = middle }
    }
    return low
  }

  /// Removes the buffers that begin at the addresses; returns those that were found.
  package func remove(_ addresses: [UInt64]) -> [Buffer] {
    state.withLock { state in
      let removed: [Buffer]
      if addresses.count == 1 {
        let index = Self.position(of: addresses[0], in: state.buffers)
        guard index < state.buffers.count, state.buffers[index].range.address == addresses[0] else {
          return []
        }
        removed = [state.buffers.remove(at: index)]
      } else {
        let wanted = Set(addresses)
        removed = state.buffers.filter { wanted.contains($0.range.address) }
        if removed.isEmpty { return [] }
        state.buffers.removeAll { wanted.contains($0.range.address) }
      }
      Self.publish(&state)
      versionWord.wrappingAdd(1, ordering: .releasing)
      return removed
    }
  }

  private static func publish(_ state: inout State) {
    state.table = RangeTable(state.buffers.map(\.range))
  }

  private static func validate(_ range: RemoteBuffer) throws(MooncakeError) {
    if range.address == 0 { throw MooncakeError(.invalidArgument, "the buffer's address is null") }
    if range.length == 0 { throw MooncakeError(.invalidArgument, "the buffer is empty") }
    if range.address.addingReportingOverflow(range.length).overflow
      || range.length > RemoteBuffer.lengthLimit
    {
      throw MooncakeError(.invalidArgument, "the buffer wraps around the end of the address space")
    }
  }

  package static func describe(_ range: RemoteBuffer) -> String {
    "[0x\(String(range.address, radix: 16)), +\(range.length))"
  }
}
