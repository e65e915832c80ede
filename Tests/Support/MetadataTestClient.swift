import Glibc
import MooncakeSystem

/// Plain requests to a metadata server of this host over one connection.
package struct MetadataTestClient: ~Copyable {
  package struct Answer {
    package let status: Int
    package let body: String
  }

  let socket: Socket

  package init(port: UInt16, from host: String = "127.0.0.1") throws {
    guard let source = SocketAddress(numeric: host, port: 0),
      let target = SocketAddress(numeric: "127.0.0.1", port: port)
    else { throw Errno(EINVAL) }
    socket = try .connected(to: target, from: source)
  }

  package func send(_ text: String) throws { try socket.sendAll(Array(text.utf8)) }

  /// The next answer; status 0 if the connection ends.
  package func receive(within milliseconds: UInt64 = 10_000) throws -> Answer {
    let deadline = Deadline.after(milliseconds: milliseconds)
    var text = ""
    let chunk = UnsafeMutableRawBufferPointer.allocate(byteCount: 65_536, alignment: 1)
    defer { chunk.deallocate() }
    while true {
      if let end = text.firstRange(of: "\r\n\r\n") {
        let head = text[..<end.lowerBound].lowercased()
        let body = text[end.upperBound...]
        let length = head.split(separator: "\r\n").first { $0.hasPrefix("content-length:") }
          .flatMap { Int($0.dropFirst(15).drop { $0 == " " }) }
        if body.utf8.count >= length ?? 0 {
          return Answer(status: Int(head.dropFirst(9).prefix(3)) ?? -1, body: String(body))
        }
      }
      do throws(Errno) {
        guard let count = try socket.tryReceive(into: chunk) else {
          try socket.wait(for: POLLIN, until: deadline)
          continue
        }
        if count == 0 { return Answer(status: 0, body: text) }
        text += String(decoding: chunk[..<count], as: UTF8.self)
      } catch {
        if error.rawValue == ECONNRESET || error.rawValue == EPIPE {
          return Answer(status: 0, body: text)
        }
        throw error
      }
    }
  }

  package func ask(
    _ method: String, _ target: String, _ body: String = "", within milliseconds: UInt64 = 10_000
  ) throws -> Answer {
    try send(
      "\(method) \(target) HTTP/1.1\r\nHost: h\r\nContent-Length: \(body.utf8.count)\r\n\r\n"
        + body)
    return try receive(within: milliseconds)
  }

  /// Makes a lease; returns its number.
  package func grant(ttlMilliseconds: Int) throws -> String {
    let answer = try ask("POST", "/metadata/lease?ttl_ms=\(ttlMilliseconds)")
    return answer.body.split(separator: "\"").first { UInt64($0) != nil }.map(String.init) ?? ""
  }
}
