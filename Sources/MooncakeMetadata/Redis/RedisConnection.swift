import CHiredis
import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// The functions of hiredis, opened when the first connection needs them. hiredis formats and
/// parses; the socket is ours, because hiredis's own blocks beyond deadlines.
struct HiredisLibrary: Sendable {
  let createReader: @convention(c) () -> UnsafeMutablePointer<redisReader>?
  let freeReader: @convention(c) (UnsafeMutablePointer<redisReader>) -> Void
  let feed: @convention(c) (UnsafeMutablePointer<redisReader>, UnsafePointer<CChar>, Int) -> Int32
  let takeReply:
    @convention(c) (
      UnsafeMutablePointer<redisReader>, UnsafeMutablePointer<UnsafeMutableRawPointer?>
    ) -> Int32
  let freeReply: @convention(c) (UnsafeMutableRawPointer) -> Void
  let format:
    @convention(c) (
      UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>, Int32,
      UnsafeMutablePointer<UnsafePointer<CChar>?>, UnsafePointer<Int>
    ) -> Int32
  let freeCommand: @convention(c) (UnsafeMutablePointer<CChar>) -> Void

  private static let isPrepared = Atomic(false)
  private static let loaded: HiredisLibrary? = HiredisLibrary()

  /// The library, loaded once. Only this version: later ones have different structures.
  static func shared() throws(MooncakeError) -> HiredisLibrary {
    Fork.prepare(isPrepared) { _ = loaded }
    if let loaded { return loaded }
    throw MooncakeError(
      .unsupported,
      "metadata in Redis needs libhiredis.so.0.14: install the Debian package libhiredis0.14")
  }

  private init?() {
    guard let library = DynamicLibrary("libhiredis.so.0.14") else { return nil }
    func find<Function>(_ name: String, _ type: Function.Type) -> Function? {
      library.symbol(name).map { unsafeBitCast($0, to: type) }
    }
    guard let createReader = find("redisReaderCreate", type(of: createReader)),
      let freeReader = find("redisReaderFree", type(of: freeReader)),
      let feed = find("redisReaderFeed", type(of: feed)),
      let takeReply = find("redisReaderGetReply", type(of: takeReply)),
      let freeReply = find("freeReplyObject", type(of: freeReply)),
      let format = find("redisFormatCommandArgv", type(of: format)),
      let freeCommand = find("redisFreeCommand", type(of: freeCommand))
    else { return nil }
    self.createReader = createReader
    self.freeReader = freeReader
    self.feed = feed
    self.takeReply = takeReply
    self.freeReply = freeReply
    self.format = format
    self.freeCommand = freeCommand
  }
}

/// What Redis answers to a command.
package enum RedisReply {
  case none
  case text([UInt8])
  case number(Int64)
  case list([RedisReply])
  case refusal(String)
}

/// Why there is no answer.
package struct RedisFailure: Error {
  package let code: MooncakeError.Code
  package let cause: String
  package let remedy: String

  static func broken(_ error: Errno, _ deadline: Deadline) -> RedisFailure {
    switch error.rawValue {
    case ECANCELED:
      RedisFailure(
        code: .canceled, cause: "given up because it was canceled or the engine was destroyed",
        remedy: "call again if it is still wanted")
    case ETIMEDOUT where deadline.hasPassed:
      RedisFailure(
        code: .timeout, cause: "no answer before the deadline",
        remedy: "is the service stopped or overloaded?")
    default:
      RedisFailure(
        code: .unreachable, cause: "the connection broke: \(error)",
        remedy: "the service may have restarted")
    }
  }
}

/// A connection to Redis, used by one thread at a time.
final class RedisConnection: @unchecked Sendable {
  // Unchecked: the service gives it to one caller at a time.
  private static let answerLimit = 256 << 20
  private static let chunkBytes = 64 << 10
  private static let connectMilliseconds: UInt64 = 1500
  /// Elements that a list may announce, far more than any that is asked for: hiredis makes room for
  /// all of them at once, and walking through it later takes longer than a call may.
  private static let elementLimit: Int32 = 1 << 20

  private let library: HiredisLibrary
  private let socket: Socket
  private let reader: UnsafeMutablePointer<redisReader>
  /// How the reader makes what it has read.
  private let makers: UnsafeMutablePointer<redisReplyObjectFunctions>

  init(
    _ library: HiredisLibrary, to server: HostPort, _ call: Call
  ) throws(RedisFailure) {
    self.library = library
    socket = try Self.connect(server, call)
    guard let reader = library.createReader() else {
      throw RedisFailure(code: .outOfMemory, cause: "no memory", remedy: "free some")
    }
    self.reader = reader
    makers = .allocate(capacity: 1)
    makers.initialize(to: reader.pointee.fn.pointee)
    makers.pointee.createArray = { task, count in
      guard count <= RedisConnection.elementLimit, let task,
        let makers = task.pointee.privdata?.assumingMemoryBound(to: redisReplyObjectFunctions.self)
      else { return nil }
      return makers.pointee.createArray(task, count)
    }
    reader.pointee.privdata = UnsafeMutableRawPointer(reader.pointee.fn)
    reader.pointee.fn = makers
  }

  deinit {
    library.freeReader(reader)
    makers.deallocate()
  }

  /// Whether the service has closed it or sent something unasked.
  var isStale: Bool { Waiting.isReadable(socket.rawValue) }

  private static func connect(
    _ server: HostPort, _ call: Call
  ) throws(RedisFailure) -> Socket {
    let addresses: [SocketAddress]
    do throws(ResolveError) {
      addresses = try Resolver.resolve(
        server.host, port: server.port ?? 6379, deadline: call.deadline,
        cancellation: call.cancellation)
    } catch {
      if error.isCanceled { throw .broken(Errno(ECANCELED), call.deadline) }
      throw RedisFailure(
        code: error.isTimeout ? .timeout : .unresolved,
        cause: "cannot resolve \(server.host): \(error)",
        remedy: "check the name and this machine's name service")
    }
    var last = RedisFailure(code: .unresolved, cause: "no address", remedy: "check the name")
    for (index, address) in addresses.enumerated() {
      // Split the time, so that an address that drops packets leaves some for the others.
      let left = call.deadline.remainingNanoseconds / 1_000_000
      let share = min(connectMilliseconds, left / UInt64(addresses.count - index) + 1)
      do throws(Errno) {
        let socket = try Socket(family: address.family)
        try socket.startConnect(to: address)
        try socket.wait(
          for: POLLOUT, until: min(call.deadline, .after(milliseconds: share)),
          cancellation: call.cancellation)
        if let error = socket.takeError() { throw error }
        // Connecting to a port of the ephemeral range without a listener may connect the socket to
        // itself.
        if try socket.localAddress() == address { throw .connectionRefused }
        socket.setNoDelay()
        return socket
      } catch {
        if error.rawValue == ECANCELED { throw .broken(error, call.deadline) }
        last = RedisFailure(
          code: call.deadline.hasPassed ? .timeout : .unreachable,
          cause: "cannot connect to \(address): \(error)",
          remedy: "does the service run, and is this its address?")
      }
      if call.deadline.hasPassed { break }
    }
    throw last
  }

  /// Sends commands in one go and waits for all answers.
  func run(_ commands: [[String]], _ call: Call) throws(RedisFailure) -> [RedisReply] {
    do throws(Errno) {
      try send(commands.flatMap(format), call)
    } catch {
      throw .broken(error, call.deadline)
    }
    var replies: [RedisReply] = []
    for _ in commands { replies.append(try receive(call)) }
    return replies
  }

  private func format(_ command: [String]) -> [UInt8] {
    let words = command.map { Array($0.utf8CString) }
    var lengths = command.map(\.utf8.count)
    var pointers = words.map { word in
      let copy = UnsafeMutablePointer<CChar>.allocate(capacity: word.count)
      copy.initialize(from: word, count: word.count)
      return UnsafePointer<CChar>?(copy)
    }
    defer { for pointer in pointers { pointer?.deallocate() } }
    var text: UnsafeMutablePointer<CChar>?
    let count = library.format(&text, Int32(command.count), &pointers, &lengths)
    guard count >= 0, let text else { return [] }
    defer { library.freeCommand(text) }
    return Array(UnsafeRawBufferPointer(start: text, count: Int(count)))
  }

  private func send(_ bytes: [UInt8], _ call: Call) throws(Errno) {
    var sentCount = 0
    while sentCount < bytes.count {
      if let count = try socket.trySend(bytes, from: sentCount) {
        sentCount += count
      } else {
        try socket.wait(for: POLLOUT, until: call.deadline, cancellation: call.cancellation)
      }
    }
  }

  private func receive(_ call: Call) throws(RedisFailure) -> RedisReply {
    var receivedCount = 0
    let chunk = UnsafeMutableRawBufferPointer.allocate(byteCount: Self.chunkBytes, alignment: 16)
    defer { chunk.deallocate() }
    while true {
      var found: UnsafeMutableRawPointer?
      guard library.takeReply(reader, &found) == 0 else {
        throw RedisFailure(
          code: .protocolViolation, cause: "it sent something that is not an answer of Redis",
          remedy: "is this the port of Redis?")
      }
      if let found {
        defer { library.freeReply(found) }
        return Self.reply(found.assumingMemoryBound(to: redisReply.self))
      }
      let count: Int
      do throws(Errno) {
        guard let received = try socket.tryReceive(into: chunk) else {
          try socket.wait(for: POLLIN, until: call.deadline, cancellation: call.cancellation)
          continue
        }
        count = received
      } catch {
        throw .broken(error, call.deadline)
      }
      if count == 0 { throw .broken(Errno(ECONNRESET), call.deadline) }
      // A server that sends without pause must not outlast the deadline.
      if call.deadline.hasPassed { throw .broken(.timedOut, call.deadline) }
      receivedCount += count
      if receivedCount > Self.answerLimit {
        throw RedisFailure(
          code: .protocolViolation, cause: "an answer of more than \(Self.answerLimit) bytes",
          remedy: "is this the metadata service?")
      }
      _ = library.feed(reader, chunk.baseAddress!.assumingMemoryBound(to: CChar.self), count)
    }
  }

  /// Recursion is safe: hiredis bounds the depth.
  private static func reply(_ reply: UnsafeMutablePointer<redisReply>) -> RedisReply {
    var text: [UInt8] {
      guard let start = reply.pointee.str else { return [] }
      return Array(UnsafeRawBufferPointer(start: start, count: Int(reply.pointee.len)))
    }
    switch reply.pointee.type {
    case REDIS_REPLY_STRING, REDIS_REPLY_STATUS: return .text(text)
    case REDIS_REPLY_INTEGER: return .number(reply.pointee.integer)
    case REDIS_REPLY_ERROR: return .refusal(String(decoding: text, as: UTF8.self))
    case REDIS_REPLY_ARRAY:
      return .list(
        (0..<Int(reply.pointee.elements)).map { index in
          guard let element = reply.pointee.element?[index] else { return .none }
          return Self.reply(element)
        })
    default: return .none
    }
  }
}
