import MooncakeSystem
import MooncakeTestSupport
import Synchronization

/// A metadata server that, like Mooncake's, only gets, puts and deletes.
final class StockHTTPServer: Sendable {
  private struct State: Sendable {
    var values: [String: [UInt8]] = [:]
    var requests: [String] = []
    /// Its answer to an unknown path or method.
    var unknownStatus: Int
    /// Whether it refuses to replace the route of a process.
    var keepsRoutes: Bool

    mutating func answer(
      _ method: String, _ target: String, _ body: [UInt8]
    ) -> (status: Int, body: [UInt8]) {
      let parts = target.split(separator: "?", maxSplits: 1)
      requests.append("\(method) \(parts[0])")
      if parts[0] != "/metadata" { return (unknownStatus, []) }
      let query = parts.dropFirst().first?.split(separator: "&") ?? []
      let key = query.first { $0.hasPrefix("key=") }.map { $0.dropFirst(4) } ?? ""
      let name = String(key.replacing("%2F", with: "/"))
      if name.isEmpty { return (400, []) }
      switch method {
      case "GET": return values[name].map { (200, $0) } ?? (404, [])
      case "PUT":
        if keepsRoutes && name.contains("rpc_meta") && values[name] != nil { return (400, []) }
        values[name] = body
        return (200, [])
      case "DELETE": return (values.removeValue(forKey: name) == nil ? 404 : 200, [])
      default: return (unknownStatus, [])
      }
    }
  }

  private final class Contents: Sendable {
    let state: Lock<State>
    init(_ state: State) { self.state = Lock(state) }
  }

  private let contents: Contents
  private let server: ScriptedServer

  init(unknownStatus: Int = 404, keepsRoutes: Bool = false) throws {
    let contents = Contents(State(unknownStatus: unknownStatus, keepsRoutes: keepsRoutes))
    self.contents = contents
    server = try ScriptedServer { request in
      let parts = request.text.split(separator: "\r\n\r\n", maxSplits: 1)
      let words = (parts.first ?? "").split(separator: " ", maxSplits: 2)
      if words.count < 3 { return .close }
      let (status, body) = contents.state.withLock {
        $0.answer(String(words[0]), String(words[1]), Array((parts.dropFirst().first ?? "").utf8))
      }
      let head = "HTTP/1.1 \(status) Said\r\nContent-Length: \(body.count)\r\n\r\n"
      return .bytes(Array(head.utf8) + body)
    }
  }

  var uri: String { "http://127.0.0.1:\(server.port)/metadata" }
  /// Method and path of each request, without the query.
  var requests: [String] { contents.state.withLock { $0.requests } }

  subscript(key: String) -> [UInt8]? {
    get { contents.state.withLock { $0.values[key] } }
    set { contents.state.withLock { $0.values[key] = newValue } }
  }

  func stop() { server.stop() }
}
