import MooncakeEngine
import MooncakeTestSupport
import Testing

struct TCPWireTests {
  @Test func headerLayout() {
    let bytes = wireHeader(.write, address: 0x1122_3344_5566_7788, size: 0x0102_0304_0506_0708)
    let size: [UInt8] = [8, 7, 6, 5, 4, 3, 2, 1]
    let address: [UInt8] = [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]
    #expect(bytes == size + address + [0x81, 0, 0, 0, 0, 0, 0, 0])
  }

  @Test(arguments: [
    (Opcode.read, false, UInt8(0)), (.write, false, 1), (.read, true, 0x80), (.write, true, 0x81),
  ])
  func headersComeBack(_ opcode: Opcode, _ isAcknowledged: Bool, _ code: UInt8) {
    for value: UInt64 in [0, 1, 1 << 32, 1 << 63, .max] {
      let header = TCPWire.Header(
        size: value, address: ~value, opcode: opcode, isAcknowledged: isAcknowledged)
      let bytes = wireHeader(
        opcode, address: ~value, size: value, isAcknowledged: isAcknowledged)
      #expect(bytes[16] == code)
      #expect(bytes.withUnsafeBytes { TCPWire.Header($0.baseAddress!) } == header)
      // Unaligned, and with arbitrary padding.
      let shifted = [0xFF] + bytes[..<17] + [1, 2, 3, 4, 5, 6, 7]
      #expect(shifted.withUnsafeBytes { TCPWire.Header($0.baseAddress! + 1) } == header)
    }
  }

  @Test(arguments: [
    (UInt64(0x4D43_5456_0000_0000), TCPWire.Status.ok),
    (0x4D43_5456_0000_0001, .rejected), (0x4D43_5456_0000_0007, .failed(7)),
    (0x4D43_5456_FFFF_FFFF, .failed(.max)), (0, .malformed), (1, .malformed),
    (0x0000_0000_4D43_5456, .malformed), (0x4D43_5457_0000_0000, .malformed), (.max, .malformed),
  ])
  func statuses(_ word: UInt64, _ status: TCPWire.Status) {
    #expect(
      FakeConnection.frame(word).withUnsafeBytes { TCPWire.Status($0.baseAddress!) } == status)
  }

  @Test func statusBytes() {
    #expect(FakeConnection.frame(TCPWire.statusOK) == [0, 0, 0, 0, 0x56, 0x54, 0x43, 0x4D])
    #expect(FakeConnection.frame(TCPWire.statusRejected) == [1, 0, 0, 0, 0x56, 0x54, 0x43, 0x4D])
  }
}
