import Glibc
import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Our server through its client, and servers that only get, put and delete.
@Suite(.serialized)
struct HTTPServiceTests {
  private var call: Call { Call(until: .after(milliseconds: 10_000)) }

  private func store(_ uri: String) throws -> any MetadataService {
    try MetadataServices.open(MetadataURI(parsing: uri), settings: MetadataSettings())
  }

  @Test func aNewerValueIsNeverDeleted() throws {
    let server = try MetadataServer()
    defer { server.stop() }
    let former = MetadataEntry(key: "mooncake/store/head", value: "former")
    let newer = MetadataEntry(key: former.key, value: "newer")
    let stores = try (0..<2).map { _ in try store(server.uri) }
    let complaints = Complaints()
    for round in 0..<300 {
      try stores[0].put(former, lease: nil, call)
      try onThreads(2) { index in
        complaints.check("round \(round)") {
          // Not always in the same order.
          if index == round % 2 { usleep(UInt32(round % 10) * 30) }
          if index == 0 {
            try stores[0].put(newer, lease: nil, call)
          } else {
            try stores[1].revoke(nil, [former], call)
          }
        }
      }
      let value = try stores[0].get(former.key, call)
      complaints.require(value == newer.value, "round \(round): \(value ?? "nothing") is there")
    }
    #expect(complaints.all == [])
  }

  /// The number of keys is right, but one of them is wrong.
  @Test func aStrayHidesNoLostKey() throws {
    let server = try MetadataServer()
    defer { server.stop() }
    let service = try store(server.uri)
    let lease = try service.grant(ttlMilliseconds: 10_000, call)
    let entries = ["a", "b"].map { MetadataEntry(key: "mooncake/\($0)", value: "1") }
    for entry in entries { try service.put(entry, lease: lease, call) }
    try service.put(MetadataEntry(key: "mooncake/stray", value: "1"), lease: lease, call)
    try service.revoke(nil, [entries[0]], call)
    var lost: [String] = []
    var strays: [String] = []
    for _ in 0..<4 where lost.isEmpty {
      let renewal = try service.renew(lease, entries, strays: &strays, call)
      if case .lost(let keys) = renewal { lost = keys }
    }
    #expect(lost == [entries[0].key])
    #expect(strays == ["mooncake/stray"])
  }

  @Test func onlyTheNamedValueIsDeleted() throws {
    let folder = JournalFolder()
    var options = MetadataServer.Options()
    options.directory = folder.path
    let server = try MetadataServer(options)
    let service = try store(server.uri)
    let large = String(repeating: "v", count: 1 << 20)
    for (value, other) in [("a", "b"), ("", "a"), ("a", ""), (large, large + "v")] {
      let entry = MetadataEntry(key: "mooncake/x", value: value)
      try service.put(entry, lease: nil, call)
      try service.revoke(nil, [MetadataEntry(key: entry.key, value: other)], call)
      #expect(try service.get(entry.key, call) == value)
      try service.revoke(nil, [entry], call)
      #expect(try service.get(entry.key, call) == nil)
      // A repeated call finds nothing to do.
      try service.revoke(nil, [entry], call)
    }
    // An ordinary change: watched, and kept across a restart.
    let entry = MetadataEntry(key: "mooncake/x", value: "1")
    try service.put(entry, lease: nil, call)
    let watch = MetadataWatch(service, prefix: "mooncake/")
    #expect(try watch.next(call) == [.put(entry)])
    try service.revoke(nil, [entry], call)
    #expect(try watch.next(call) == [.delete(key: entry.key)])
    server.stop()
    let again = try MetadataServer(options)
    defer { again.stop() }
    #expect(try store(again.uri).get(entry.key, call) == nil)
  }

  @Test func deletesAsAnHTTPClientAsksForThem() throws {
    let server = try MetadataServer()
    defer { server.stop() }
    let client = try MetadataTestClient(to: server)
    #expect(try client.ask("POST", "/metadata/delete", "v").status == 400)
    #expect(try client.ask("POST", "/metadata/delete?key=k", "v").body == "{\"deleted\":0}")
    #expect(try client.ask("PUT", "/metadata?key=k", "v").status == 200)
    #expect(try client.ask("POST", "/metadata/delete?key=k", "w").body == "{\"deleted\":0}")
    #expect(try client.ask("GET", "/metadata/delete?key=k").status == 405)
    let tooLarge = String(repeating: "v", count: (16 << 20) + 1)
    #expect(try client.ask("POST", "/metadata/delete?key=k", tooLarge).body == "{\"deleted\":0}")
    #expect(try client.ask("GET", "/metadata?key=k").body == "v")
    #expect(try client.ask("POST", "/metadata/delete?key=k", "v").body == "{\"deleted\":1}")
    #expect(try client.ask("GET", "/metadata?key=k").status == 404)
  }

  @Test(arguments: [400, 404, 405, 501])
  func serversWithoutOurPathsAreAskedKeyByKey(status: Int) throws {
    let server = try StockHTTPServer(unknownStatus: status)
    defer { server.stop() }
    let service = try store(server.uri)
    server["a"] = Array("1".utf8)
    server["b"] = [0xFF, 0xFE]
    let values = try service.values(of: ["a", "missing", "b"], call)
    #expect(values[0] == "1" && values[1] == nil)
    // A value that is not text differs from any text, but is not an error.
    #expect(values[2] != nil && values.count == 3)
    #expect(
      server.requests
        == ["POST /metadata/values"] + [String](repeating: "GET /metadata", count: 3))
  }

  @Test(arguments: [400, 404, 405, 501])
  func serversWithoutOurPathsDeleteInTwoSteps(status: Int) throws {
    let server = try StockHTTPServer(unknownStatus: status)
    defer { server.stop() }
    let service = try store(server.uri)
    server["a"] = Array("1".utf8)
    server["b"] = [0xFF]
    let others = [("a", "2"), ("b", "1"), ("missing", "1")].map {
      MetadataEntry(key: $0.0, value: $0.1)
    }
    try service.revoke(nil, others, call)
    #expect(server["a"] == Array("1".utf8) && server["b"] == [0xFF])
    try service.revoke(nil, [MetadataEntry(key: "a", value: "1")], call)
    #expect(server["a"] == nil)
  }

  @Test func serversWithoutLeasesKeepWhatIsPut() throws {
    let server = try StockHTTPServer(keepsRoutes: true)
    defer { server.stop() }
    let service = try store(server.uri)
    #expect(try service.grant(ttlMilliseconds: 1000, call) == nil)
    let entry = MetadataEntry(key: "rpc_meta/x", value: "2")
    server[entry.key] = Array("1".utf8)
    try service.put(entry, lease: nil, call)
    #expect(server[entry.key] == Array("2".utf8))
    #expect(try service.renew(nil, [entry], call) == .kept)
    server[entry.key] = nil
    #expect(try service.renew(nil, [entry], call) == .gone)
    // Such a server would replace the existing value.
    server["taken"] = Array("1".utf8)
    do {
      _ = try service.putIfAbsent(MetadataEntry(key: "taken", value: "2"), lease: nil, call)
      Issue.record("a server without that parameter was asked")
    } catch { #expect(error.code == .unsupported) }
    #expect(server["taken"] == Array("1".utf8))
  }
}
