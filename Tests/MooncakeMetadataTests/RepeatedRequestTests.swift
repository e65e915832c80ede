import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Requests that take effect although their answer is lost: the caller must not be told that
/// somebody else did it.
struct RepeatedRequestTests {
  private var call: Call { Call(until: .after(milliseconds: 8000)) }

  private func store(_ scheme: String, _ ports: UInt16...) throws -> any MetadataService {
    let hosts = ports.map { "127.0.0.1:\($0)" }.joined(separator: ",")
    return try MetadataServices.open(MetadataURI(parsing: "\(scheme)://\(hosts)"))
  }

  private func code(_ body: () throws -> Void) -> MooncakeError.Code? {
    do { try body() } catch { return (error as? MooncakeError)?.code }
    return nil
  }

  private let entry = MetadataEntry(key: "k", value: "mine")

  /// libcurl repeats a request by itself if a kept connection ends without an answer.
  @Test func conditionalRequestsOverHTTPAreSentOnce() throws {
    let server = try ScriptedServer { request in
      if request.text.hasPrefix("GET") {
        return .http(200, #"{"revision":5,"more":0,"entries":[]}"#)
      }
      return .close
    }
    defer { server.stop() }
    let store = try store("http", server.port)
    _ = try store.list(prefix: "", from: nil, limit: 1, call)
    #expect(code { _ = try store.putIfAbsent(entry, lease: nil, call) } == .unreachable)
    #expect(server.requestCount("PUT ") == 1)
    #expect(code { _ = try store.delete("k", call) } == .unreachable)
    #expect(server.requestCount("DELETE ") == 1)
    #expect(code { _ = try store.grant(ttlMilliseconds: 1000, call) } == .unreachable)
    #expect(server.requestCount("POST ") == 1)
  }

  @Test func conditionalRequestsToEtcdAreSentOnce() throws {
    let server = try ScriptedServer { request in
      request.text.contains("/v3/kv/range") ? .http(200, #"{"header":{"revision":"5"}}"#) : .close
    }
    defer { server.stop() }
    let store = try store("etcd", server.port)
    #expect(try store.get("k", call) == nil)
    #expect(code { _ = try store.putIfAbsent(entry, lease: nil, call) } == .unreachable)
    #expect(server.requestCount("/v3/kv/txn") == 1)
    #expect(code { _ = try store.replace("k", writtenBy: 1, with: "x", call) } == .unreachable)
    #expect(server.requestCount("/v3/kv/txn") == 2)
    #expect(code { _ = try store.delete("k", call) } == .unreachable)
    #expect(server.requestCount("/v3/kv/deleterange") == 1)
  }

  @Test func deletionsThatAnEndpointDidNotConfirmCount() throws {
    let lossy = try ScriptedServer { _ in .close }
    let empty = try ScriptedServer { _ in .http(200, #"{"header":{"revision":"5"}}"#) }
    defer {
      lossy.stop()
      empty.stop()
    }
    #expect(try store("etcd", lossy.port, empty.port).delete("k", call))
    // An unreachable server has deleted nothing.
    #expect(try !store("etcd", 1, empty.port).delete("k", call))
    #expect(try !store("etcd", empty.port).delete("k", call))
    let failing = try ScriptedServer { _ in
      .http(503, #"{"error":"etcdserver: request timed out"}"#)
    }
    defer { failing.stop() }
    #expect(try store("etcd", failing.port, empty.port).delete("k", call))
  }

  /// A Redis whose connection 0 ends at `broken` after executing it.
  private func redis(_ broken: String, holding value: String) throws -> ScriptedServer {
    try ScriptedServer { request in
      func has(_ word: String) -> Bool { request.text.contains("\r\n\(word)\r\n") }
      if has("HELLO") { return .text("-ERR unknown command 'HELLO'\r\n") }
      if request.connection == 0 && has(broken) { return .close }
      if has("SET") { return .text("$-1\r\n") }
      if has("DEL") { return .text(":0\r\n") }
      return .text("$\(value.utf8.count)\r\n\(value)\r\n")
    }
  }

  @Test(arguments: [("mine", true), ("another's", false)])
  func redisPutsOnce(value: String, isDone: Bool) throws {
    let server = try redis("SET", holding: value)
    defer { server.stop() }
    let store = try store("redis", server.port)
    #expect(try store.get("k", call) == value)
    #expect(try store.putIfAbsent(entry, lease: nil, call) == isDone)
    #expect(server.requestCount("NX") == 2)
  }

  @Test func redisDeletesOnce() throws {
    let server = try redis("DEL", holding: "v")
    defer { server.stop() }
    let store = try store("redis", server.port)
    #expect(try store.get("k", call) == "v")
    #expect(try store.delete("k", call))
    #expect(try !store.delete("k", call))
  }

  /// A connection that ended while idle has sent nothing, so it does not count as an attempt.
  @Test func whatRedisHasClosedBeforeIsNoAttempt() throws {
    let server = try ScriptedServer { request in
      func has(_ word: String) -> Bool { request.text.contains("\r\n\(word)\r\n") }
      if has("HELLO") { return .text("-ERR unknown command 'HELLO'\r\n") }
      if has("SET") { return .text("$-1\r\n") }
      if has("DEL") { return .text(":0\r\n") }
      return .last("$4\r\nmine\r\n")
    }
    defer { server.stop() }
    let store = try store("redis", server.port)
    for _ in 0..<2 {
      #expect(try store.get("k", call) == "mine")
      sleepBriefly(nanoseconds: 50_000_000)
      #expect(try !store.putIfAbsent(entry, lease: nil, call))
      #expect(try !store.delete("k", call))
    }
  }
}
