/// The type of an RPC message.
package enum RPCType: UInt8, Sendable, CaseIterable {
  /// Exchange of RDMA queue pairs.
  case connection = 0
  /// The responder's segment descriptor.
  case metadata = 1
  case notify = 2
  case probe = 3
  /// A call of a service on top of an engine; only between engines of this library. No JSON text
  /// begins with this byte.
  case service = 64
}

/// A received message.
package struct RPCMessage: Sendable, Equatable {
  package var type: RPCType
  /// Without a type byte: a connection message from an old peer, which expects an answer without
  /// one.
  package var isOldProtocol: Bool
  /// JSON text, not yet checked.
  package var body: [UInt8]

  package init(type: RPCType, isOldProtocol: Bool, body: [UInt8]) {
    self.type = type
    self.isOldProtocol = isOldProtocol
    self.body = body
  }

  /// A message as it travels: length, type, text.
  package static func encoded(type: RPCType, isOldProtocol: Bool = false, body: String) -> [UInt8] {
    let length = UInt64(body.utf8.count + (isOldProtocol ? 0 : 1))
    var bytes: [UInt8] = []
    bytes.reserveCapacity(Int(length) + 8)
    withUnsafeBytes(of: length.littleEndian) { bytes.append(contentsOf: $0) }
    if !isOldProtocol { bytes.append(type.rawValue) }
    bytes.append(contentsOf: body.utf8)
    return bytes
  }
}

/// Why bytes are not a message.
package enum RPCMessageError: Error, Equatable, Sendable, CustomStringConvertible {
  case empty
  case tooLong(announced: UInt64, limit: Int)
  case unexpectedType(UInt8)

  package var description: String {
    switch self {
    case .empty: "an empty message"
    case .tooLong(let announced, let limit):
      "a message of \(announced) bytes, more than the \(limit) accepted here"
    case .unexpectedType(let type): "a message of unknown type \(type)"
    }
  }
}

/// Assembles a message from pieces of any size. Memory grows with the bytes received, never with
/// the announced length.
package struct RPCMessageParser: Sendable {
  private let limit: Int
  private var header: UInt64 = 0
  private var headerByteCount = 0
  private var type: RPCType?
  private var isOldProtocol = false
  private var body: [UInt8] = []
  private var remaining = 0

  /// Accepts lengths from 1 to `limit`, including the type byte.
  package init(limit: Int) { self.limit = limit }

  /// Whether no byte has arrived yet.
  package var isEmpty: Bool { headerByteCount == 0 }

  /// Bytes received so far.
  package var receivedByteCount: Int {
    headerByteCount + body.count + (type != nil && !isOldProtocol ? 1 : 0)
  }

  /// Bytes of memory that it holds.
  var heldByteCount: Int { body.capacity }

  /// Consumes bytes up to the end of the message; returns how many and, once complete, the message.
  /// After that, or after an error, the parser must not be used again.
  package mutating func consume(
    _ bytes: UnsafeRawBufferPointer
  ) throws(RPCMessageError) -> (count: Int, message: RPCMessage?) {
    var position = 0
    while headerByteCount < 8 {
      if position == bytes.count { return (position, nil) }
      header |= UInt64(bytes[position]) << UInt64(headerByteCount * 8)
      headerByteCount += 1
      position += 1
      if headerByteCount == 8 { try checkLength() }
    }
    if type == nil {
      if position == bytes.count { return (position, nil) }
      try takeType(bytes[position], position: &position)
    }
    let count = min(remaining, bytes.count - position)
    body.append(contentsOf: bytes[position..<(position + count)])
    remaining -= count
    position += count
    guard remaining == 0, let type else { return (position, nil) }
    return (position, RPCMessage(type: type, isOldProtocol: isOldProtocol, body: body))
  }

  private mutating func checkLength() throws(RPCMessageError) {
    if header == 0 { throw .empty }
    if header > UInt64(limit) { throw .tooLong(announced: header, limit: limit) }
    remaining = Int(header)
  }

  /// Old peers send no type byte: a byte that is not a type begins their JSON text.
  private mutating func takeType(
    _ byte: UInt8, position: inout Int
  ) throws(RPCMessageError) {
    if byte >= 0x80 { throw .unexpectedType(byte) }
    if let known = RPCType(rawValue: byte) {
      type = known
      position += 1
      remaining -= 1
    } else {
      type = .connection
      isOldProtocol = true
    }
  }
}
