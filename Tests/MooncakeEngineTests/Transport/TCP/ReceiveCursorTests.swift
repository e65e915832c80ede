import CLinux
import MooncakeEngine
import Testing

@Suite struct ReceiveCursorTests {
  private static let length = 100

  /// `body` gets a cursor, a slice of one request and its status frame, which says ok.
  private func withRequest(
    _ opcode: Opcode, isOneShot: Bool = false,
    _ body: (inout ReceiveCursor, SlicePointer, UnsafeMutableRawPointer) -> Void
  ) {
    let task = UnsafeMutablePointer<TransferTask>.allocate(capacity: 1)
    let slice = SlicePointer.allocate(capacity: 1)
    let status = UnsafeMutableRawPointer.allocate(byteCount: TCPWire.statusBytes, alignment: 8)
    defer {
      task.deallocate()
      slice.deallocate()
      status.deallocate()
    }
    status.storeBytes(of: TCPWire.statusOK.littleEndian, as: UInt64.self)
    slice.initialize(
      to: Slice(
        task: task, local: status, remote: 0, length: Self.length, deadline: .max, opcode: opcode,
        isPooled: false))
    var cursor = ReceiveCursor(isOneShot: isOneShot)
    body(&cursor, slice, status)
  }

  private func isComplete(_ step: ReceiveCursor.Step) -> Bool {
    if case .complete = step { return true }
    return false
  }

  private func isIncomplete(_ step: ReceiveCursor.Step) -> Bool {
    if case .incomplete = step { return true }
    return false
  }

  @Test func takesOneAnswerOffTheBytes() {
    withRequest(.read) { cursor, slice, status in
      var left = TCPWire.statusBytes + Self.length + 7
      #expect(isComplete(cursor.advance(&left, slice, status: status)))
      #expect(left == 7 && cursor.offset == 0)
    }
    withRequest(.write) { cursor, slice, status in
      var left = TCPWire.statusBytes
      #expect(isComplete(cursor.advance(&left, slice, status: status)) && left == 0)
    }
  }

  /// All connections of a loop share its status frames: half of one must outlive another's use.
  @Test func keepsHalfOfAStatusFrame() {
    withRequest(.read) { cursor, slice, status in
      var left = 3
      #expect(isIncomplete(cursor.advance(&left, slice, status: status)))
      #expect(cursor.offset == 3 && !cursor.hasData)
      status.storeBytes(of: .max, as: UInt64.self)

      var queue = SliceQueue()
      queue.append(slice)
      var window = SendWindow(isOneShot: false)
      window.append(contentsOf: &queue)
      window.advance(TCPWire.headerBytes)
      withUnsafeTemporaryAllocation(of: iovec.self, capacity: TCPWire.vectorLimit) { vectors in
        let laid = cursor.scatter(window, into: vectors.baseAddress!, statuses: status)
        #expect(laid.count == 2 && laid.byteCount == TCPWire.statusBytes - 3 + Self.length)
        #expect(vectors[0].iov_base == status + 3)
      }
      withUnsafeBytes(of: TCPWire.statusOK.littleEndian) { frame in
        (status + 3).copyMemory(from: frame.baseAddress! + 3, byteCount: 5)
      }
      left = 5 + Self.length
      #expect(isComplete(cursor.advance(&left, slice, status: status)) && left == 0)
    }
  }

  @Test func reportsAnotherStatus() {
    withRequest(.write) { cursor, slice, status in
      status.storeBytes(of: TCPWire.statusRejected.littleEndian, as: UInt64.self)
      var left = TCPWire.statusBytes
      guard case .failed(.rejected) = cursor.advance(&left, slice, status: status) else {
        Issue.record("a refusal was taken for something else")
        return
      }
    }
  }

  /// Version 1 answers a write by closing the connection.
  @Test func oneShotWritesHaveNoBytes() {
    withRequest(.write, isOneShot: true) { cursor, slice, status in
      var left = 1
      guard case .unexpected = cursor.advance(&left, slice, status: status) else {
        Issue.record("bytes were taken for an answer")
        return
      }
    }
    withRequest(.read, isOneShot: true) { cursor, slice, status in
      var left = Self.length
      #expect(isComplete(cursor.advance(&left, slice, status: status)))
    }
  }
}
