/// An immutable, sorted set of buffers that finds the one containing a range. Used for local
/// registrations and for remote descriptors.
package final class RangeTable: Sendable {
  package enum Verdict: Equatable, Sendable {
    case allowed
    case notRegistered
    case accessDenied
  }

  package let buffers: [RemoteBuffer]

  /// `buffers` must be sorted by address and must not overlap.
  package init(_ buffers: [RemoteBuffer]) { self.buffers = buffers }

  /// Whether the whole range lies inside one buffer that grants `right`.
  @inline(__always)
  package func check(_ address: UInt64, _ length: UInt64, _ right: Access) -> Verdict {
    let index = find(address, length)
    if index < 0 { return .notRegistered }
    return buffers[index].access.contains(right) ? .allowed : .accessDenied
  }

  /// As above, and notes the buffer in the slice.
  @inline(__always)
  package func check(_ slice: SlicePointer) -> Verdict {
    let index = find(slice.pointee.remote, UInt64(slice.pointee.length))
    if index < 0 { return .notRegistered }
    slice.pointee.remoteBuffer = Int32(truncatingIfNeeded: index)
    let right = slice.pointee.opcode.requiredAccess
    return buffers[index].access.contains(right) ? .allowed : .accessDenied
  }

  /// Index of the buffer that contains the whole range; -1 if there is none.
  @inline(__always)
  package func find(_ address: UInt64, _ length: UInt64) -> Int {
    buffers.withUnsafeBufferPointer { buffers in
      guard length > 0 else { return -1 }
      let count = Self.countBeginning(upTo: address, in: buffers)
      guard count > 0 else { return -1 }
      let buffer = buffers[count - 1]
      let offset = address &- buffer.address
      // Overflow-safe: both sides stay below the buffer's length.
      guard offset < buffer.length, length <= buffer.length &- offset else { return -1 }
      return count - 1
    }
  }

  /// How many buffers begin at or before an address.
  func countBeginning(upTo address: UInt64) -> Int {
    buffers.withUnsafeBufferPointer { Self.countBeginning(upTo: address, in: $0) }
  }

  @inline(__always)
  private static func countBeginning(
    upTo address: UInt64, in buffers: UnsafeBufferPointer<RemoteBuffer>
  ) -> Int {
    var low = 0
    var high = buffers.count
    while low < high {
      let middle = (low + high) >> 1
      if buffers[middle].address <= address { low = middle + 1 } else { high = middle }
    }
    return low
  }
}

extension Opcode {
  /// The right that the target must have granted.
  package var requiredAccess: Access { self == .read ? .remoteRead : .remoteWrite }
}
