import CLinux
import Glibc

/// The answers of a server connection that wait to be sent, in the order of their requests.
struct ReplyQueue {
  private struct Reply {
    var address: UInt64
    var length: Int
    var frame: Frame
    var totalBytes: Int { length + (frame == .none ? 0 : TCPWire.statusBytes) }
  }

  /// The status frame of an answer; version 1 has none.
  private enum Frame { case none, ok, rejected }

  private var replies: [Reply] = []
  /// The first that is not completely sent.
  private var firstIndex = 0
  /// Bytes of it that are sent.
  private var firstOffset = 0

  /// With so many unsent the connection is not read any more.
  private static let limit = 1024

  private var count: Int { replies.count - firstIndex }

  var isEmpty: Bool { firstIndex == replies.count }

  var isFull: Bool { count >= Self.limit }

  /// Bytes of read data in the first one.
  var firstLength: Int { replies[firstIndex].length }

  // MARK: Adding

  /// Answers a read, which is served from `address`.
  @inline(__always)
  mutating func addData(_ address: UInt64, _ length: Int, hasStatus: Bool) {
    replies.append(Reply(address: address, length: length, frame: hasStatus ? .ok : .none))
  }

  /// Answers a write.
  @inline(__always)
  mutating func addDone() { replies.append(Reply(address: 0, length: 0, frame: .ok)) }

  mutating func addRefusal() { replies.append(Reply(address: 0, length: 0, frame: .rejected)) }

  // MARK: Sending

  /// Whether an unsent answer has data in one of the ranges.
  func touches(_ ranges: [RemoteBuffer]) -> Bool {
    replies[firstIndex...].contains { reply in
      reply.length > 0 && ranges.contains { $0.touches(reply.address, reply.length) }
    }
  }

  /// Fills vectors with what is to be sent next, one chunk at most; returns their number.
  func gather(into vectors: UnsafeMutablePointer<iovec>) -> Int {
    var count = 0
    var room = TCPWire.sendChunkBytes
    var skip = firstOffset
    var index = firstIndex
    while index < replies.count, count + 2 <= TCPWire.vectorLimit, room > 0 {
      let reply = replies[index]
      if reply.frame != .none {
        if skip < TCPWire.statusBytes {
          let frame = reply.frame == .ok ? TCPServerLoop.okFrame : TCPServerLoop.rejectedFrame
          vectors[count] = iovec(
            iov_base: UnsafeMutableRawPointer(mutating: frame + skip),
            iov_len: TCPWire.statusBytes - skip)
          count += 1
          skip = 0
        } else {
          skip -= TCPWire.statusBytes
        }
      }
      let length = min(reply.length - skip, room)
      if length > 0 {
        vectors[count] = iovec(
          iov_base: UnsafeMutableRawPointer(bitPattern: UInt(reply.address) + UInt(skip)),
          iov_len: length)
        count += 1
        room -= length
      }
      skip = 0
      index += 1
    }
    return count
  }

  /// Notes that the socket took so many of the gathered bytes.
  mutating func advance(_ byteCount: Int) {
    var left = byteCount
    while left > 0 {
      let due = replies[firstIndex].totalBytes - firstOffset
      if left < due {
        firstOffset += left
        break
      }
      left -= due
      firstOffset = 0
      firstIndex += 1
    }
    removeSent()
  }

  /// Frees the room of sent answers, also where a peer always leaves some unsent. It never moves
  /// more answers than it removes.
  private mutating func removeSent() {
    if isEmpty {
      replies.removeAll(keepingCapacity: replies.capacity <= 4 * Self.limit)
    } else if firstIndex >= max(Self.limit, replies.count / 2) {
      replies.removeFirst(firstIndex)
    } else {
      return
    }
    firstIndex = 0
  }
}

extension RemoteBuffer {
  /// Whether `length` bytes at `address`, not none, share a byte with the buffer.
  func touches(_ address: UInt64, _ length: Int) -> Bool {
    self.address < address &+ UInt64(length) && address < self.address &+ self.length
  }
}
