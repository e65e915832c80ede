import CLinux
import Glibc

/// How far the first answer of a connection has arrived, and where the next bytes belong.
package struct ReceiveCursor {
  /// What the bytes that were looked at make of an answer.
  package enum Step {
    case incomplete
    case complete
    /// Its status is not ok.
    case failed(TCPWire.Status)
    /// The request has no answer with bytes in it.
    case unexpected
  }

  /// Bytes of the first answer that have arrived.
  package private(set) var offset = 0
  /// What has arrived of a status frame that came in two parts.
  private var partialStatus: UInt64 = 0
  /// After the kernel could not write to some destination, answers are received one by one, so that
  /// the next fault is known to be the first one's.
  private var receivesAlone = false
  /// Bytes of a status frame; version 1 sends none.
  private let statusBytes: Int

  /// Read data that one system call takes.
  private static let receiveLimitBytes = 1 << 20

  package init(isOneShot: Bool) { statusBytes = isOneShot ? 0 : TCPWire.statusBytes }

  /// Whether read data of an answer that is not complete has arrived.
  package var hasData: Bool { offset > TCPWire.statusBytes }

  /// The next connection starts with a whole answer.
  package mutating func rewind() {
    offset = 0
    receivesAlone = false
  }

  /// Lays out where the next bytes of the stream belong: status frames in `statuses`, read data in
  /// its place.
  @inline(__always)
  package func scatter(
    _ window: SendWindow, into vectors: UnsafeMutablePointer<iovec>,
    statuses: UnsafeMutableRawPointer
  ) -> (count: Int, byteCount: Int) {
    var count = 0
    var total = 0
    var skip = offset
    var status = statuses
    var cursor = window.first
    var left = receivesAlone ? 1 : window.onWireCount
    while let slice = cursor, left > 0, count + 2 <= TCPWire.vectorLimit {
      if skip < statusBytes {
        if skip > 0 { status.storeBytes(of: partialStatus, as: UInt64.self) }
        vectors[count] = iovec(iov_base: status + skip, iov_len: statusBytes - skip)
        count += 1
        total += statusBytes - skip
        skip = statusBytes
      }
      status += TCPWire.statusBytes
      if slice.pointee.opcode == .read {
        let done = skip - statusBytes
        let length = slice.pointee.length - done
        vectors[count] = iovec(iov_base: slice.pointee.local + done, iov_len: length)
        count += 1
        total += length
        if total >= Self.receiveLimitBytes { break }
      }
      skip = 0
      cursor = slice.pointee.next
      left -= 1
    }
    if count == 0 {
      // Version 1 write: only the end of the stream is expected.
      vectors[0] = iovec(iov_base: statuses, iov_len: 1)
      return (1, 1)
    }
    return (count, total)
  }

  /// Takes what belongs to the first answer off the `left` bytes that have arrived. `status` is
  /// where `scatter` put its status frame.
  @inline(__always)
  package mutating func advance(
    _ left: inout Int, _ slice: SlicePointer, status: UnsafeMutableRawPointer
  ) -> Step {
    if offset < statusBytes {
      let part = min(left, statusBytes - offset)
      offset += part
      left -= part
      if offset < statusBytes {
        // Kept here until the rest arrives: all connections of the loop share its status frames.
        partialStatus = status.loadUnaligned(as: UInt64.self)
        return .incomplete
      }
      let status = TCPWire.Status(status)
      if status != .ok { return .failed(status) }
    }
    let payload = slice.pointee.opcode == .read ? slice.pointee.length : 0
    let total = statusBytes + payload
    if total == 0 { return .unexpected }
    assert(offset <= total)
    let part = min(left, total - offset)
    offset += part
    left -= part
    if offset < total { return .incomplete }
    offset = 0
    receivesAlone = false
    return .complete
  }

  /// Makes the next `scatter` take one answer only; false if the last one did already.
  package mutating func receiveAlone() -> Bool {
    if receivesAlone { return false }
    receivesAlone = true
    return true
  }
}
