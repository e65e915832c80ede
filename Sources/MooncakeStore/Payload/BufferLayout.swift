/// Buffers laid end to end, as a payload sees them.
package struct BufferLayout: Equatable, Sendable {
  package struct Buffer: Equatable, Sendable {
    package var address: UInt64
    package var length: UInt64

    package init(address: UInt64, length: UInt64) {
      self.address = address
      self.length = length
    }
  }

  package let buffers: [Buffer]
  /// What an engine registers: the buffers, or the one range that all of them lie in.
  package let ranges: [Buffer]
  /// Where each begins in the payload.
  private let starts: [UInt64]
  /// Bytes of all.
  package let size: UInt64

  /// nil if a buffer is empty or wraps around, or all are more than addresses count. `range`:
  /// memory of the same owner that all lie in.
  package init?(_ buffers: [Buffer], in range: Buffer? = nil) {
    var starts: [UInt64] = []
    starts.reserveCapacity(buffers.count)
    var size: UInt64 = 0
    for buffer in buffers {
      let (_, wraps) = buffer.address.addingReportingOverflow(buffer.length)
      let (end, overflow) = size.addingReportingOverflow(buffer.length)
      if buffer.length == 0 || buffer.address == 0 || wraps || overflow { return nil }
      starts.append(size)
      size = end
    }
    self.buffers = buffers
    ranges = range.map { buffers.isEmpty ? [] : [$0] } ?? buffers
    self.starts = starts
    self.size = size
  }

  /// Whether any byte is in both.
  static func overlap(_ first: [Buffer], _ second: [Buffer]) -> Bool {
    first.contains { old in
      second.contains { new in
        new.address < old.address + old.length && old.address < new.address + new.length
      }
    }
  }

  /// The address of a range of the payload; nil if it does not lie in one buffer.
  package func address(of offset: UInt64, length: UInt64) -> UInt64? {
    guard let index = index(at: offset) else { return nil }
    let inside = offset - starts[index]
    guard length <= buffers[index].length - inside else { return nil }
    return buffers[index].address + inside
  }

  /// The buffer that holds a byte; nil beyond the last.
  package func index(at offset: UInt64) -> Int? {
    if offset >= size { return nil }
    var low = 0
    var high = starts.count
    while high - low > 1 {
      let middle = (low + high) / 2
      if starts[middle] <= offset { low = middle } else { high = middle }
    }
    return low
  }

  /// How many bytes follow a byte in its buffer, itself included; 0 beyond the last.
  package func bytesLeft(at offset: UInt64) -> UInt64 {
    guard let index = index(at: offset) else { return 0 }
    return buffers[index].length - (offset - starts[index])
  }
}
