import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Which services compare revisions, and what those answer that do not.
struct RevisionTests {
  private var call: Call { Call(until: .after(milliseconds: 5000)) }

  private func open(_ uri: String) throws -> any MetadataService {
    try MetadataServices.open(MetadataURI(parsing: uri))
  }

  private func failure(_ body: () throws -> Void) -> MooncakeError? {
    do { try body() } catch { return error as? MooncakeError }
    return nil
  }

  /// Nobody listens there: they refuse without asking.
  @Test(arguments: ["http://127.0.0.1:1/metadata", "redis://127.0.0.1:1"])
  func servicesWithoutRevisionsSaySo(uri: String) throws {
    let service = try open(uri)
    #expect(!service.comparesRevisions)
    let reading = failure { _ = try service.getRevised("k", call) }
    #expect(reading?.code == .unsupported)
    #expect(reading?.message.contains("get 'k' with its revision: this service does not") == true)
    let putting = failure { _ = try service.replace("k", writtenBy: 0, with: "v", call) }
    #expect(putting?.code == .unsupported)
    #expect(putting?.message.contains("put 'k' if unchanged") == true)
    let deleting = failure { _ = try service.replace("k", writtenBy: 1, with: nil, call) }
    #expect(deleting?.message.contains("delete 'k' if unchanged") == true)
  }

  @Test func etcdTellsWhichRevisionWroteAKey() throws {
    let server = try ScriptedServer { _ in
      .http(
        200,
        #"{"header":{"revision":"9"},"kvs":[{"key":"aw==","value":"/w==","mod_revision":"7"}]}"#)
    }
    defer { server.stop() }
    let service = try open("etcd://127.0.0.1:\(server.port)")
    #expect(service.comparesRevisions)
    #expect(
      try service.getRevised("k", isText: false, call) == RevisedValue("\u{FFFD}", revision: 7))
    // The value is the byte 0xFF.
    #expect(failure { _ = try service.getRevised("k", call) }?.code == .protocolViolation)
  }
}
