import MooncakeEngine
import Testing

/// Slices that are never ended, all in one window; nothing of their task is used.
private final class Slices {
  let first: SlicePointer
  private let task = UnsafeMutablePointer<TransferTask>.allocate(capacity: 1)

  init(_ opcode: Opcode, count: Int, length: Int) {
    first = .allocate(capacity: count)
    for index in 0..<count {
      (first + index).initialize(
        to: Slice(
          task: task, local: UnsafeMutableRawPointer(first), remote: UInt64(index * length),
          length: length, deadline: .max, opcode: opcode, isPooled: false))
    }
  }

  deinit {
    first.deallocate()
    task.deallocate()
  }

  func window(_ count: Int, isOneShot: Bool = false) -> SendWindow {
    var queue = SliceQueue()
    for index in 0..<count { queue.append(first + index) }
    var window = SendWindow(isOneShot: isOneShot)
    window.append(contentsOf: &queue)
    return window
  }
}

private func count(_ slices: SliceQueue) -> Int { slices.count }

@Suite struct SendWindowTests {
  private static let length = 100
  private static let requestBytes = TCPWire.headerBytes + length

  @Test func countsWholeAndPartialRequests() {
    let slices = Slices(.write, count: 4, length: Self.length)
    var window = slices.window(4)
    #expect(window.maySend && window.onWireCount == 0 && window.unsent == slices.first)
    window.advance(2 * Self.requestBytes + 30)
    #expect(window.sentCount == 2 && window.partialBytes == 30 && window.onWireCount == 3)
    #expect(window.unsent == slices.first + 2)
    #expect(window.unansweredWrites() == [0..<300])
    #expect(window.popAnswered() == slices.first)
    #expect(window.sentCount == 1 && window.unsent == slices.first + 2)
    window.advance(2 * Self.requestBytes - 30)
    #expect(window.sentCount == 3 && window.partialBytes == 0 && window.unsent == nil)
    #expect(!window.maySend)
  }

  /// A batch may be canceled between the question whether anything on the wire is due and the
  /// removal: what could still receive data must stay.
  @Test func removesNothingThatIsOnTheWire() {
    let slices = Slices(.write, count: 5, length: Self.length)
    var window = slices.window(5)
    window.advance(Self.requestBytes + 1)
    let removed = window.removeAll { _ in true }
    #expect(removed.count == 3 && removed.first == slices.first + 2)
    #expect(window.count == 2 && window.onWireCount == 2)
    #expect(window.unsent == slices.first + 1 && window.partialBytes == 1)
    window.rewind()
    #expect(count(window.removeAll { _ in true }) == 2)
    #expect(window.isEmpty && window.unsent == nil)
  }

  @Test func removalKeepsWhatIsSentNext() {
    let slices = Slices(.write, count: 5, length: Self.length)
    var window = slices.window(5)
    window.advance(2 * Self.requestBytes)
    #expect(count(window.removeAll { $0 == slices.first + 2 }) == 1)
    #expect(window.unsent == slices.first + 3 && window.sentCount == 2)
  }

  @Test func rewindsToTheStart() {
    let slices = Slices(.write, count: 3, length: Self.length)
    var window = slices.window(3)
    window.advance(Self.requestBytes + TCPWire.headerBytes)
    window.rewind()
    #expect(window.onWireCount == 0 && window.unsent == slices.first && window.count == 3)
    #expect((0..<3).map { slices.first[$0].wasSent } == [true, true, false])
  }

  @Test func sendsSuspectsAlone() {
    let slices = Slices(.write, count: 3, length: Self.length)
    var window = slices.window(3)
    slices.first[1].attempts = 3
    #expect(window.maySend)
    window.advance(Self.requestBytes)
    #expect(!window.maySend, "a suspect behind another request")
    _ = window.popAnswered()
    #expect(window.maySend)
    window.advance(Self.requestBytes)
    #expect(!window.maySend, "a request behind a suspect")
  }

  @Test func oneShotHasOneRequest() {
    let slices = Slices(.read, count: 2, length: Self.length)
    var window = slices.window(2, isOneShot: true)
    window.advance(TCPWire.headerBytes)
    #expect(window.sentCount == 1 && !window.maySend)
  }
}
