// Feeds streams of requests to the data port of a running engine and compares its answers with a
// model's. It is a finding if a byte outside the registered buffers changes, an answer differs, a
// connection does not end, or the engine stops serving.

import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

@c(LLVMFuzzerInitialize)
public func initialize(
  _ count: UnsafeMutablePointer<CInt>?, _ arguments: UnsafeMutableRawPointer?
) -> CInt {
  Log.setLevel(.off)
  return 0
}

@c(LLVMFuzzerTestOneInput)
public func testOneInput(_ data: UnsafePointer<UInt8>?, _ size: Int) -> CInt {
  guard let data, size > 1 else { return 0 }
  target.run(UnsafeRawBufferPointer(start: data, count: size))
  return 0
}

// The fuzzer calls from one thread.
nonisolated(unsafe) private let target = FuzzTarget()

/// One engine for the whole run. Its memory: guard, a buffer for everything, guard, a read-only
/// buffer, guard, a write-only buffer, guard.
private final class FuzzTarget {
  private static let part = 8192
  private static let guardByte: UInt8 = 0xC3
  private static let readOnlyByte: UInt8 = 0x33

  private let engine: TransferEngine
  private let memory: MemoryMapping
  private let address: SocketAddress
  private var runCount: UInt32 = 0

  init() {
    var options = TransferEngine.Options()
    options.ioThreads = 1
    engine = try! TransferEngine(options)
    memory = try! .anonymous(byteCount: 7 * Self.part)
    address = engine.tcp!.server.address
    for index in 0..<7 {
      memset(memory.address + index * Self.part, Int32(Self.byte(ofPart: index)), Self.part)
    }
    let rights: [Access] = [[.remoteRead, .remoteWrite], .remoteRead, .remoteWrite]
    for (index, access) in rights.enumerated() {
      try! engine.register(
        memory.address + (2 * index + 1) * Self.part, length: UInt64(Self.part), access: access)
    }
  }

  private static func byte(ofPart index: Int) -> UInt8 {
    index % 2 == 0 ? guardByte : index == 3 ? readOnlyByte : 0
  }

  func run(_ input: UnsafeRawBufferPointer) {
    runCount += 1
    let pieces = Self.stream(from: input, base: UInt64(UInt(bitPattern: memory.address)))
    let (answer, isReset) = exchange(pieces)
    compare(answer, with: expectation(Array(pieces.joined())), isReset: isReset)
    for index in [0, 2, 3, 4, 6] {
      let start = memory.address + index * Self.part
      precondition(start.load(as: UInt8.self) == Self.byte(ofPart: index), "a byte changed")
      precondition(memcmp(start, start + 1, Self.part - 1) == 0, "a byte changed")
    }
    if runCount % 64 == 0 { checkService() }
  }

  /// The answers of a server that handles one request after the other.
  private func expectation(_ stream: [UInt8]) -> [Answer] {
    var answers: [Answer] = []
    var position = 0
    while stream.count - position >= TCPWire.headerBytes {
      let header = stream.withUnsafeBytes { TCPWire.Header($0.baseAddress! + position) }
      position += TCPWire.headerBytes
      guard let part = part(for: header) else {
        answers.append(header.isAcknowledged ? .status(TCPWire.statusRejected) : .reset)
        break
      }
      if header.opcode == .write {
        if Int(header.size) > stream.count - position { break }
        position += Int(header.size)
      }
      if header.isAcknowledged { answers.append(.status(TCPWire.statusOK)) }
      if header.opcode == .read { answers.append(.data(part: part, Int(header.size))) }
    }
    return answers
  }

  /// The buffer that contains the whole range and grants the request.
  private func part(for header: TCPWire.Header) -> Int? {
    let base = UInt64(UInt(bitPattern: memory.address))
    let length = UInt64(Self.part)
    guard header.size > 0, header.size <= length, header.address >= base,
      header.address - base <= 7 * length - header.size
    else { return nil }
    let first = Int((header.address - base) / length)
    guard first == Int((header.address - base + header.size - 1) / length) else { return nil }
    switch first {
    case 1: return first
    case 3: return header.opcode == .read ? first : nil
    case 5: return header.opcode == .write ? first : nil
    default: return nil
    }
  }

  private func compare(_ bytes: [UInt8], with answers: [Answer], isReset: Bool) {
    var rest = bytes[...]
    for answer in answers {
      switch answer {
      case .reset: return precondition(rest.isEmpty, "bytes after a refusal")
      case .status(let word):
        let frame = withUnsafeBytes(of: word.littleEndian) { Array($0) }
        precondition(frame.starts(with: rest.prefix(8)), "another status")
        rest = rest.dropFirst(8)
      case .data(let part, let count):
        // The contents of other buffers depend on when later requests of the stream are stored.
        if part == 3 {
          precondition(rest.prefix(count).allSatisfy { $0 == Self.readOnlyByte }, "other data")
        }
        if rest.count < count { return precondition(isReset, "the answer is cut off") }
        rest = rest.dropFirst(count)
      }
    }
    precondition(rest.isEmpty, "bytes that nobody asked for")
    let byteCount = answers.reduce(0) { $0 + $1.byteCount }
    precondition(isReset || bytes.count == byteCount, "the answer is cut off")
  }

  /// Checks that a valid request still works.
  private func checkService() {
    var request = [UInt8](repeating: 0, count: TCPWire.headerBytes)
    let place = UInt64(UInt(bitPattern: memory.address + 3 * Self.part))
    request.withUnsafeMutableBytes {
      TCPWire.Header(size: 4, address: place, opcode: .read, isAcknowledged: true)
        .write(to: $0.baseAddress!)
    }
    let expected =
      [0, 0, 0, 0, 0x56, 0x54, 0x43, 0x4D] + [UInt8](repeating: Self.readOnlyByte, count: 4)
    precondition(exchange([request]).answer == expected, "a good request is not served")
  }

  /// Sends the pieces, half-closes, and returns everything that comes back until the end.
  private func exchange(_ pieces: [[UInt8]]) -> (answer: [UInt8], isReset: Bool) {
    let deadline = Deadline.after(milliseconds: 10_000)
    var answer: [UInt8] = []
    do throws(Errno) {
      let socket = try connect(deadline)
      for piece in pieces { try send(piece, on: socket, &answer, deadline) }
      socket.shutdownWrite()
      while try receive(from: socket, &answer) { try socket.wait(for: POLLIN, until: deadline) }
    } catch {
      // A refusal may reset the connection while more is being sent.
      precondition(error.rawValue == ECONNRESET || error.rawValue == EPIPE, "\(error)")
      return (answer, true)
    }
    return (answer, false)
  }

  private func connect(_ deadline: Deadline) throws(Errno) -> Socket {
    let socket = try Socket(family: address.family)
    // A new source address each time: closed connections keep their ports for a minute.
    let host = "127.\(runCount >> 16 & 0x7F | 0x80).\(runCount >> 8 & 0xFF).\(runCount & 0xFF)"
    if let source = SocketAddress(numeric: host, port: 0) {
      _ = source.withPointer { bind(socket.rawValue, $0, $1) }
    }
    try socket.startConnect(to: address)
    try socket.wait(for: POLLOUT, until: deadline)
    if let error = socket.takeError() { throw error }
    socket.setNoDelay()
    return socket
  }

  private func send(
    _ bytes: [UInt8], on socket: borrowing Socket, _ answer: inout [UInt8], _ deadline: Deadline
  ) throws(Errno) {
    var sent = 0
    while sent < bytes.count {
      if let count = try socket.trySend(bytes, from: sent) {
        sent += count
      } else {
        // The server takes more only once its answers have been received.
        try socket.wait(for: POLLIN | POLLOUT, until: deadline)
        guard try receive(from: socket, &answer) else { return }
      }
    }
  }

  /// Receives what is there; false at the end of the stream.
  private func receive(
    from socket: borrowing Socket, _ answer: inout [UInt8]
  ) throws(Errno) -> Bool {
    try withUnsafeTemporaryAllocation(byteCount: 64 << 10, alignment: 1) {
      chunk throws(Errno) in
      while let count = try socket.tryReceive(into: chunk) {
        if count == 0 { return false }
        answer.append(contentsOf: chunk[..<count])
      }
      return true
    }
  }

  /// Makes requests from the input, so that mutations move within and around the buffers: a kind
  /// byte, then what the kind needs. The very first byte splits the stream into pieces.
  private static func stream(from input: UnsafeRawBufferPointer, base: UInt64) -> [[UInt8]] {
    var reader = ByteReader(input)
    let cut = Int(reader.next())
    var stream: [UInt8] = []
    var requestLimit = 256
    while !reader.isEmpty, stream.count < 1 << 20, requestLimit > 0 {
      requestLimit -= 1
      let kind = reader.next()
      switch kind & 3 {
      case 0:
        // A small request somewhere in the memory.
        let address = base &+ UInt64(reader.next(2))
        stream += header(UInt64(reader.next(2)), address, reader.next())
      case 1:
        // Numbers of all magnitudes.
        let size = UInt64(reader.next(4)) &* UInt64(1) << UInt64(kind >> 3 & 31)
        let address =
          base &+ UInt64(bitPattern: Int64(Int32(bitPattern: reader.next(4)))) << UInt64(kind >> 5)
        stream += header(kind & 4 == 0 ? size : 0 &- size, address, reader.next())
      case 2:
        stream += [UInt8](repeating: reader.next(), count: Int(reader.next(2)))
      default:
        for _ in 0..<(kind >> 2) { stream.append(reader.next()) }
      }
    }
    if cut == 0 { return [stream] }
    let piece = cut * cut
    return stride(from: 0, to: stream.count, by: piece).prefix(64).map {
      Array(stream[$0..<($0 / piece == 63 ? stream.count : min($0 + piece, stream.count))])
    }
  }

  private static func header(_ size: UInt64, _ address: UInt64, _ opcode: UInt8) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: TCPWire.headerBytes)
    bytes.withUnsafeMutableBytes {
      TCPWire.Header(size: size, address: address, opcode: .read, isAcknowledged: false)
        .write(to: $0.baseAddress!)
    }
    bytes[16] = opcode
    return bytes
  }
}

/// A part of a server's answer.
private enum Answer {
  case status(UInt64)
  case data(part: Int, Int)
  /// The connection ends here without an answer.
  case reset

  var byteCount: Int {
    switch self {
    case .status: TCPWire.statusBytes
    case .data(_, let count): count
    case .reset: 0
    }
  }
}

/// Reads little-endian numbers from the input; zeros at its end.
private struct ByteReader {
  private let bytes: UnsafeRawBufferPointer
  private var position = 0

  init(_ bytes: UnsafeRawBufferPointer) { self.bytes = bytes }

  var isEmpty: Bool { position >= bytes.count }

  mutating func next() -> UInt8 {
    defer { position += 1 }
    return isEmpty ? 0 : bytes[position]
  }

  mutating func next(_ count: Int) -> UInt32 {
    (0..<count).reduce(0) { $0 | UInt32(next()) << UInt32(8 * $1) }
  }
}
