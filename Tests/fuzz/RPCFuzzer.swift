// Feeds arbitrary bytes to everything that reads what a peer of the RPC daemon sends: framing, JSON,
// descriptors, answers and peer names. A trap, a sanitizer report or a broken round trip is a finding.

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

/// The first byte says in pieces of how many bytes the rest arrives.
@c(LLVMFuzzerTestOneInput)
public func testOneInput(_ data: UnsafePointer<UInt8>?, _ size: Int) -> CInt {
  guard let data, size > 0 else { return 0 }
  let bytes = UnsafeRawBufferPointer(start: data + 1, count: size - 1)
  if let message = receive(bytes, inPiecesOf: max(1, Int(data[0]))) {
    answer(message)
    readDescriptor(message.body)
  }
  // Also without a frame around it, so that mutations reach the texts sooner.
  readDescriptor(Array(bytes))
  readName(Array(bytes.prefix(2 * HostPort.maximumBytes)))
  return 0
}

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
  guard let text = try? RPCAnswer.body(to: message, handlers: handlers) else { return }
  precondition((try? JSONDocument(parsing: text)) != nil, "an answer that is no JSON")
}

private func readDescriptor(_ body: [UInt8]) {
  guard let text = String(validating: body, as: UTF8.self),
    var descriptor = try? SegmentDescriptor(json: text)
  else { return }
  for buffer in descriptor.buffers {
    precondition(buffer.address != 0 && buffer.length != 0, "an empty buffer")
    precondition(
      !buffer.address.addingReportingOverflow(buffer.length).overflow, "a buffer that wraps")
  }
  guard let again = try? SegmentDescriptor(json: descriptor.json()) else {
    fatalError("a descriptor that does not parse back")
  }
  // Several protocols come back as the one that counts.
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
