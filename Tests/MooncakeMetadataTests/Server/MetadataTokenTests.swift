import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import Testing

struct MetadataTokenTests {
  private let secret = "s3same-open+/="

  @Test func presentation() throws {
    let token = try MetadataToken(secret, from: "test")
    func isPresented(_ text: String) -> Bool { token.isPresented(by: Array(text.utf8)) }
    for good in ["Bearer \(secret)", "bearer \(secret)", "BEARER   \(secret)"] {
      #expect(isPresented(good))
    }
    for bad in [
      "", "Bearer", "Bearer ", secret, "Basic \(secret)", "Bearer \(secret)x", "Bearer x\(secret)",
      "Bearer \(secret.dropLast())", "Bearer \(secret.dropFirst())", "Bearer\(secret)",
      "Bearer \(secret) ", "Bearer \(String(repeating: "s", count: 100_000))",
    ] {
      #expect(!isPresented(bad), "\(bad.prefix(40))")
    }
  }

  @Test func malformed() {
    for text in ["", " a", "a ", "a\nb", "a\r", "\u{7F}", "é", String(repeating: "a", count: 5000)]
    {
      do throws(MooncakeError) {
        _ = try MetadataToken(text, from: "THE SOURCE")
        Issue.record("accepted \(text)")
      } catch {
        #expect(error.code == .invalidArgument && error.message.contains("THE SOURCE"))
      }
    }
  }

  private func store(
    _ server: MetadataServer, token: String?, user: String? = nil
  ) throws -> any MetadataService {
    var settings = MetadataSettings()
    settings.token = token
    settings.user = user
    settings.password = user
    return try MetadataServices.open(MetadataURI(parsing: server.uri), settings: settings)
  }

  @Test func serverAsksForIt() throws {
    var options = MetadataServer.Options()
    options.token = secret
    let server = try MetadataServer(options)
    defer { server.stop() }
    let call = Call(until: .after(milliseconds: 5000))
    let entry = MetadataEntry(key: "k", value: String(repeating: "v", count: 1 << 20))
    for (token, user) in [(nil, nil), ("wrong", nil), (nil, "u")] as [(String?, String?)] {
      let service = try store(server, token: token, user: user)
      func isRefused(_ body: () throws -> Void) {
        do {
          try body()
          Issue.record("accepted without the token")
        } catch let error as MooncakeError {
          #expect(error.code == .accessDenied)
          #expect(error.message.contains("MC_METADATA_HTTP_TOKEN"))
          #expect(!error.message.contains(secret) && !error.message.contains("wrong"))
        } catch { Issue.record(error) }
      }
      isRefused { try service.put(entry, lease: nil, call) }
      isRefused { _ = try service.get("k", call) }
      isRefused { _ = try service.delete("k", call) }
      isRefused { _ = try service.list(prefix: "", from: nil, limit: 1, call) }
      isRefused { _ = try service.grant(ttlMilliseconds: 1000, call) }
    }
    let service = try store(server, token: secret, user: "ignored")
    try service.put(entry, lease: nil, call)
    #expect(try service.get("k", call) == entry.value)
    #expect(try service.grant(ttlMilliseconds: 1000, call) != nil)
  }

  @Test func openServersTakeAny() throws {
    let server = try MetadataServer()
    defer { server.stop() }
    let call = Call(until: .after(milliseconds: 5000))
    #expect(try store(server, token: "any").get("k", call) == nil)
  }
}
