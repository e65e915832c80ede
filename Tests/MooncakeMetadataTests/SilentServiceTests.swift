import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Services that accept a wait for changes and never answer it.
struct SilentServiceTests {
  private func call(_ milliseconds: UInt64) -> Call {
    Call(until: .after(milliseconds: milliseconds))
  }

  private func store(_ scheme: String, _ server: ScriptedServer) throws -> any MetadataService {
    try MetadataServices.open(MetadataURI(parsing: "\(scheme)://127.0.0.1:\(server.port)"))
  }

  private static let page =
    #"{"revision":5,"more":0,"entries":[{"key":"a","value":"1"}]}"#

  @Test func aServerThatMissesItsOwnTimeIsNotTakenForQuiet() throws {
    let server = try ScriptedServer { request in
      request.text.contains("since=") ? .silence : .http(200, Self.page)
    }
    defer { server.stop() }
    let watch = MetadataWatch(try store("http", server), prefix: "")
    #expect(try watch.next(call(5000)) == [.put(MetadataEntry(key: "a", value: "1"))])
    // So short a wait proves nothing.
    #expect(try watch.next(call(200)) == [])
    let time = elapsedMilliseconds {
      #expect(throws: MooncakeError.self) { try watch.next(call(1000)) }
    }
    #expect((900...4000).contains(time), "it took \(time) ms")
    #expect(server.requestCount("limit=") == 1)
    // It may have lost everything, so everything is compared.
    _ = try? watch.next(call(1000))
    #expect(server.requestCount("limit=") == 2)
  }

  @Test func aListingMayTakeLongerThanAWait() throws {
    let server = try ScriptedServer { request in
      if request.text.contains("since=") { return .silence }
      sleepBriefly(nanoseconds: 700_000_000)
      return .http(200, Self.page)
    }
    defer { server.stop() }
    let watch = MetadataWatch(try store("http", server), prefix: "")
    #expect(try watch.next(call(100), listing: call(8000)).count == 1)
  }

  @Test func aSilentWatchOnEtcdIsDoubtedAtOnce() throws {
    let server = try ScriptedServer { request in
      request.text.contains("/v3/watch")
        ? .silence : .http(200, #"{"header":{"revision":"5"}}"#)
    }
    defer { server.stop() }
    let store = try store("etcd", server)
    _ = try store.get("k", call(5000))
    // A watch gives up after five seconds of silence.
    guard case .changes(let changes, 5) = try store.changes(prefix: "", since: 5, call(20_000))
    else { throw MooncakeError(.system, "no quiet watch") }
    #expect(changes.isEmpty && server.requestCount("/v3/watch") == 1)
    _ = try store.changes(prefix: "", since: 5, call(500))
    #expect(server.requestCount("min_mod_revision") == 1)
  }
}
