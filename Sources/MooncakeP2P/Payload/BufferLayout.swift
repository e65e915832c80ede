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
  /// What the engine registers: the buffers, or the one range that contains them all.
  package let ranges: [Buffer]
  /// Where each begins in the payload.
  private let starts: [UInt64]
  /// Bytes of all buffers.
  package let size: UInt64

  /// nil if a buffer is empty or wraps around, or if together they exceed the address space.
  /// `range`: memory of the same owner that contains all of them.
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

  /// Whether the lists share a byte; buffers of one list may overlap each other.
  package static func overlap(_ first: [Buffer], _ second: [Buffer]) -> Bool {
    var comparisons = 0
    return overlap(first, second, comparisons: &comparisons)
  }

  /// Also counts comparisons: there may be 65,536 buffers on either side.
  package static func overlap(
    _ first: [Buffer], _ second: [Buffer], comparisons: inout Int
  ) -> Bool {
    if first.isEmpty || second.isEmpty { return false }
    var items: [(buffer: Buffer, isFirst: Bool)] = []
    items.reserveCapacity(first.count + second.count)
    for buffer in first { items.append((buffer, true)) }
    for buffer in second { items.append((buffer, false)) }
    var count = 0
    items.sort { one, other in
      count += 1
      return one.buffer.address < other.buffer.address
    }
    comparisons += count
    // In each list, the furthest end of what began before, because the nearest buffer may be a
    // short one.
    var (firstEnd, secondEnd): (UInt64, UInt64) = (0, 0)
    for (buffer, isFirst) in items {
      comparisons += 1
      if buffer.address < (isFirst ? secondEnd : firstEnd) { return true }
      let end = buffer.address + buffer.length
      if isFirst { firstEnd = max(firstEnd, end) } else { secondEnd = max(secondEnd, end) }
    }
    return false
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

  /// How many bytes its buffer has left from a byte on, including it; 0 beyond the last.
  package func bytesLeft(at offset: UInt64) -> UInt64 {
    guard let index = index(at: offset) else { return 0 }
    return buffers[index].length - (offset - starts[index])
  }
}
