// Feeds arbitrary bytes to everything that reads what a peer of the RPC daemon sends: framing,
// JSON, descriptors, answers and peer names. A trap, a sanitizer report or a broken round trip is
// a finding.

import MooncakeBase
import MooncakeEngine
import MooncakeSystem

private let limit = 1 << 20

@c(LLVMFuzzerInitialize)
public func initialize(
  _ count: UnsafeMutablePointer<CInt>?, _ arguments: UnsafeMutableRawPointer?
) -> CInt {
  Log.setLevel(.off)
  return 0
}

/// With a first byte from 0x80 on, every other byte is a word of `vocabulary`. Below, the rest are
/// bytes from the wire, and the first gives the size of the pieces in which they arrive.
@c(LLVMFuzzerTestOneInput)
public func testOneInput(_ data: UnsafePointer<UInt8>?, _ size: Int) -> CInt {
  guard let data, size > 0 else { return 0 }
  let bytes = UnsafeRawBufferPointer(start: data + 1, count: size - 1)
  if data[0] >= 0x80 {
    let text = bytes.map { vocabulary[Int($0) % vocabulary.count] }.joined()
    readDescriptor(Array(text.utf8))
    for type in RPCType.allCases {
      answer(RPCMessage(type: type, isOldProtocol: false, body: Array(text.utf8)))
    }
    return 0
  }
  if let message = receive(bytes, inPiecesOf: max(1, Int(data[0]))) {
    answer(message)
    readDescriptor(message.body)
  }
  // Also without a frame, so that mutations reach the texts sooner.
  readDescriptor(Array(bytes))
  readName(Array(bytes.prefix(2 * HostPort.maximumBytes)))
  return 0
}

private let vocabulary = [
  "{", "}", "[", "]", ",", ":", "\"", "null", "true", "\"name\":\"n\",", "\"protocol\":\"tcp\",",
  "\"protocol\":[\"rdma\",\"tcp\"],", "\"protocol\":\"cxl\",", "\"buffers\":[",
  "{\"name\":\"n\",\"addr\":", ",\"length\":", ",\"mooncake_access\":",
  "\"mooncake_incarnation\":", "\"tcp_data_port\":", "\"tcp_proto_version\":", "\"tcp_data_host\":",
  "\"notify_msg\":", "\"local_nic_path\":", "\"name\":", "\"protocol\":", "\"0123456789abcdef\"",
  "\"x\"", "\"\"", "\"\\u0000\"", "\"\\ud83d\\ude00\"", "\"\\ud83d\"", "\\", "0", "1", "2", "3",
  "9",
  "-", "-0", ".", "1.5", "1e3", "1e308", "1e-9", "65535", "65536", "4096", "999999999999999",
  "1000000000000000", "9007199254740993", "9223372036854775808", "18446744073709551614",
  "18446744073709551615", "18446744073709551616", " ", "\n", "\u{1}", "\u{0}", "é", "[[[[[[[[",
  "]]]]]]]]",
]

private func receive(_ bytes: UnsafeRawBufferPointer, inPiecesOf size: Int) -> RPCMessage? {
  var parser = RPCMessageParser(limit: limit)
  var position = 0
  while position < bytes.count {
    let piece = bytes[position..<min(bytes.count, position + size)]
    guard let result = try? parser.consume(UnsafeRawBufferPointer(rebasing: piece)) else {
      return nil
    }
    position += result.count
    if let message = result.message {
      let encoded = RPCMessage.encoded(
        type: message.type, isOldProtocol: message.isOldProtocol,
        body: String(decoding: message.body, as: UTF8.self))
      let isText = String(validating: message.body, as: UTF8.self) != nil
      precondition(!isText || encoded.elementsEqual(bytes.prefix(position)), "not the same bytes")
      return message
    }
    precondition(result.count == piece.count, "bytes left over without a message")
    precondition(parser.receivedByteCount == position, "miscounted")
  }
  return nil
}

private func answer(_ message: RPCMessage) {
  let queue = NotificationQueue(maximumCount: 1, maximumBytes: 1024)
  let handlers = RPCServer.Handlers(
    descriptor: { SegmentDescriptor(name: "peer:1").json() }, notify: { queue.append($0) })
  var keeps = false
  guard let text = try? RPCAnswer.body(to: message, handlers: handlers, keeps: &keeps) else {
    return
  }
  precondition((try? JSONDocument(parsing: text)) != nil, "an answer that is no JSON")
}

private func readDescriptor(_ body: [UInt8]) {
  guard let text = String(validating: body, as: UTF8.self),
    var descriptor = try? SegmentDescriptor(json: text)
  else { return }
  for buffer in descriptor.buffers {
    precondition(buffer.address != 0 && buffer.length != 0, "an empty buffer")
    // Not a precondition: the optimizer drops one that only looks at an overflow flag.
    if buffer.address.addingReportingOverflow(buffer.length).overflow {
      fatalError("a buffer that wraps")
    }
  }
  guard let again = try? SegmentDescriptor(json: descriptor.json()) else {
    fatalError("a descriptor that does not parse back")
  }
  // Of several protocols, only the used one comes back.
  descriptor.protocolName = again.protocolName
  precondition(again == descriptor, "a descriptor that changed on the way")
}

private func readName(_ bytes: [UInt8]) {
  let text = String(decoding: bytes, as: UTF8.self)
  _ = try? HostPort(parsing: text, defaultPort: 12_001)
  guard let parsed = try? HostPort(parsing: text) else { return }
  precondition(
    parsed.description.utf8.count > HostPort.maximumBytes
      || (try? HostPort(parsing: parsed.description)) == parsed, "a name that changed on the way")
}
