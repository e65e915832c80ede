import MooncakeEngine
import Testing

struct RPCMessageTests {
  private func parse(
    _ bytes: [UInt8], pieces: Int = .max, limit: Int = 1 << 20
  ) throws(RPCMessageError) -> (count: Int, message: RPCMessage?) {
    var parser = RPCMessageParser(limit: limit)
    var position = 0
    while position < bytes.count {
      let end = min(bytes.count, pieces == .max ? bytes.count : position + pieces)
      let piece = Array(bytes[position..<end])
      let result = piece.withUnsafeBytes { buffer in
        Result { () throws(RPCMessageError) in try parser.consume(buffer) }
      }
      let (count, message) = try result.get()
      position += count
      if message != nil { return (position, message) }
      #expect(count == piece.count)
    }
    return (position, nil)
  }

  private func framed(_ length: UInt64, _ rest: [UInt8]) -> [UInt8] {
    (0..<8).map { UInt8(truncatingIfNeeded: length >> UInt64($0 * 8)) } + rest
  }

  @Test(arguments: RPCType.allCases, [1, 2, 7, 8, 9, 10, .max])
  func roundTripInPieces(type: RPCType, pieces: Int) throws {
    let body = #"{"name":"é"}"#
    let bytes = RPCMessage.encoded(type: type, body: body)
    let (count, message) = try parse(bytes + [1, 2, 3], pieces: pieces)
    #expect(count == bytes.count)
    #expect(message == RPCMessage(type: type, isOldProtocol: false, body: Array(body.utf8)))
  }

  @Test func wireBytes() {
    #expect(
      RPCMessage.encoded(type: .probe, body: "{}") == [3, 0, 0, 0, 0, 0, 0, 0, 3, 0x7B, 0x7D])
    #expect(
      RPCMessage.encoded(type: .connection, isOldProtocol: true, body: "{}")
        == [2, 0, 0, 0, 0, 0, 0, 0, 0x7B, 0x7D])
  }

  @Test(arguments: [1, .max])
  func oldProtocol(pieces: Int) throws {
    let (_, message) = try parse(framed(2, Array("{}".utf8)), pieces: pieces)
    #expect(
      message == RPCMessage(type: .connection, isOldProtocol: true, body: Array("{}".utf8)))
  }

  @Test func typeWithoutText() throws {
    let (_, message) = try parse(framed(1, [1]))
    #expect(message == RPCMessage(type: .metadata, isOldProtocol: false, body: []))
  }

  @Test func lengthBounds() throws {
    #expect(throws: RPCMessageError.empty) { try parse(framed(0, [1])) }
    for length in [1025, UInt64(Int64.max), UInt64(Int64.max) + 1, .max] {
      #expect(throws: RPCMessageError.tooLong(announced: length, limit: 1024)) {
        try parse(framed(length, [1]), limit: 1024)
      }
    }
    let full = framed(1024, [1] + [UInt8](repeating: 0x20, count: 1023))
    #expect(try parse(full, limit: 1024).message?.body.count == 1023)
  }

  @Test(arguments: UInt8(0x80)...0xFF)
  func unknownTypes(type: UInt8) {
    #expect(throws: RPCMessageError.unexpectedType(type)) { try parse(framed(9, [type])) }
  }

  @Test func incompleteIsNoMessage() throws {
    let bytes = RPCMessage.encoded(type: .notify, body: "{}")
    for length in 0..<bytes.count {
      #expect(try parse(Array(bytes[..<length])).message == nil)
    }
  }
}
