import CLinux
import Glibc

/// The slices of one connection in the order of their requests: those that are sent and not
/// answered, at most one that is sent in part, and those that wait to be sent.
///
/// When the connection breaks, the window is rewound and the next connection sends all of it again.
package struct SendWindow {
  private var queue = SliceQueue()
  /// The first slice that is not completely sent; nil when all are.
  private var next: SlicePointer?
  /// Bytes of the next request that are sent, its header included.
  package private(set) var partialBytes = 0
  /// Requests that are completely sent and not answered.
  package private(set) var sentCount = 0
  /// After the kernel could not read some source, requests are sent one by one, so that the next
  /// fault is known to be the first one's.
  private var sendsAlone = false
  /// Version 1 has no acknowledgment: one request a connection, ended by the peer's close.
  private let isOneShot: Bool

  /// Requests on the wire of one connection.
  package static let inFlightLimit = 1024
  /// A slice whose connection failed so often is sent alone, so that it harms no other.
  private static let suspectAttemptLimit = 3

  package init(isOneShot: Bool) { self.isOneShot = isOneShot }

  package var isEmpty: Bool { queue.isEmpty }

  package var first: SlicePointer? { queue.first }

  package var count: Int { queue.count }

  package var earliestDeadline: UInt64 { queue.earliestDeadline }

  /// How many slices the connection carries, whole or in part.
  package var onWireCount: Int { sentCount + (partialBytes > 0 ? 1 : 0) }

  /// The slice whose request is sent in part, or would be sent next.
  package var unsent: SlicePointer? { next }

  /// Whether there is a request that need not wait for answers first.
  @inline(__always)
  package var maySend: Bool {
    guard let next, let first = queue.first else { return false }
    if sentCount == 0 { return true }
    if isOneShot || sentCount >= Self.inFlightLimit { return false }
    // A reset may have swallowed the refusal of one of several requests: suspects go alone.
    return !Self.isSuspect(first) && !Self.isSuspect(next)
  }

  @inline(__always)
  private static func isSuspect(_ slice: SlicePointer) -> Bool {
    slice.pointee.attempts >= suspectAttemptLimit
  }
}

// MARK: - Changing what it holds

extension SendWindow {
  /// Moves every slice of `other` to the end.
  @inline(__always)
  package mutating func append(contentsOf other: inout SliceQueue) {
    if next == nil { next = other.first }
    queue.append(contentsOf: &other)
  }

  /// Removes the first slice, whose answer is complete.
  @inline(__always)
  package mutating func popAnswered() -> SlicePointer? {
    assert(sentCount > 0, "an answer to a request that is not sent")
    sentCount -= 1
    return queue.popFirst()
  }

  /// Removes the slices for which `isWanted` holds, except those on the wire.
  package mutating func removeAll(where isWanted: (SlicePointer) -> Bool) -> SliceQueue {
    var onWireLeft = onWireCount
    let removed = queue.removeAll { slice in
      if onWireLeft > 0 {
        onWireLeft -= 1
        return false
      }
      return isWanted(slice)
    }
    next = queue.first
    for _ in 0..<sentCount { next = next?.pointee.next }
    return removed
  }

  /// Removes everything; nothing may be on the wire.
  package mutating func takeAll() -> SliceQueue {
    assert(onWireCount == 0, "slices on the wire were removed")
    next = nil
    return queue.takeAll()
  }

  /// The connection is gone: the next one sends everything from the start.
  package mutating func rewind() {
    forEachOnWire { $0.pointee.wasSent = true }
    next = queue.first
    partialBytes = 0
    sentCount = 0
    sendsAlone = false
  }
}

// MARK: - Sending

extension SendWindow {
  /// Fills vectors with what is to be sent next, one chunk at most; returns their number. Headers
  /// are written to `headers`.
  @inline(__always)
  package func gather(
    into vectors: UnsafeMutablePointer<iovec>, headers: UnsafeMutableRawPointer
  ) -> Int {
    var count = 0
    var room = TCPWire.sendChunkBytes
    var skip = partialBytes
    var headerIndex = 0
    var cursor = next
    var slicesLeft = isOneShot || sendsAlone ? 1 : Self.inFlightLimit - sentCount
    while let slice = cursor, count + 2 <= TCPWire.vectorLimit, room > 0, slicesLeft > 0 {
      if skip < TCPWire.headerBytes {
        let header = headers + headerIndex * TCPWire.headerBytes
        TCPWire.Header(
          size: UInt64(slice.pointee.length), address: slice.pointee.remote,
          opcode: slice.pointee.opcode, isAcknowledged: !isOneShot
        ).write(to: header)
        headerIndex += 1
        vectors[count] = iovec(iov_base: header + skip, iov_len: TCPWire.headerBytes - skip)
        count += 1
        skip = TCPWire.headerBytes
      }
      if slice.pointee.opcode == .write {
        let done = skip - TCPWire.headerBytes
        let length = min(slice.pointee.length - done, room)
        vectors[count] = iovec(iov_base: slice.pointee.local + done, iov_len: length)
        count += 1
        room -= length
      }
      skip = 0
      cursor = slice.pointee.next
      slicesLeft -= 1
      if Self.isSuspect(slice) || cursor.map(Self.isSuspect) == true { break }
    }
    return count
  }

  /// Notes that the socket took so many of the gathered bytes.
  @inline(__always)
  package mutating func advance(_ byteCount: Int) {
    var left = byteCount
    while left > 0, let slice = next {
      let total = TCPWire.headerBytes + (slice.pointee.opcode == .write ? slice.pointee.length : 0)
      let due = total - partialBytes
      if left < due {
        partialBytes += left
        return
      }
      left -= due
      partialBytes = 0
      sendsAlone = false
      sentCount += 1
      next = slice.pointee.next
    }
    assert(sentCount <= queue.count)
  }

  /// Makes the next `gather` take one request only; false if the last one did already.
  package mutating func sendAlone() -> Bool {
    if sendsAlone { return false }
    sendsAlone = true
    return true
  }
}

// MARK: - What is on the wire

extension SendWindow {
  @inline(__always)
  private func forEachOnWire(_ body: (SlicePointer) -> Void) {
    var cursor = queue.first
    for _ in 0..<onWireCount {
      guard let slice = cursor else { break }
      body(slice)
      cursor = slice.pointee.next
    }
  }

  package func isAnyOnWire(_ isWanted: (SlicePointer) -> Bool) -> Bool {
    var isAny = false
    forEachOnWire { if isWanted($0) { isAny = true } }
    return isAny
  }

  /// Where the writes on the wire go that are not answered.
  package func unansweredWrites() -> [Range<UInt64>] {
    var ranges: [Range<UInt64>] = []
    forEachOnWire { slice in
      guard slice.pointee.opcode == .write else { return }
      let start = slice.pointee.remote
      let end = start &+ UInt64(slice.pointee.length)
      if let last = ranges.last, last.upperBound == start {
        ranges[ranges.count - 1] = last.lowerBound..<end
      } else {
        ranges.append(start..<end)
      }
    }
    return ranges
  }
}
