import MooncakeBase
import MooncakeMetadata
import MooncakeTestSupport

extension MetadataTestClient {
  init(to server: MetadataServer, from host: String = "127.0.0.1") throws {
    try self.init(port: server.address.port ?? 0, from: host)
  }

  static func revision(of server: MetadataServer) throws -> String {
    let health = try MetadataTestClient(to: server).ask("GET", "/health").body
    return String(health.split { !$0.isNumber }.last { $0.count > 10 } ?? "")
  }
}
