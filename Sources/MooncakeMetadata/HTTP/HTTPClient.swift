import CCurl
import MooncakeBase
import MooncakeSystem
import Synchronization

/// A request to an HTTP server.
struct HTTPRequest {
  enum Method: String {
    case get = "GET"
    case put = "PUT"
    case post = "POST"
    case delete = "DELETE"
  }

  var method: Method
  var server: HostPort
  var isSecure = false
  /// Path and query.
  var target: String
  var body: [UInt8]?
  /// "Name: value".
  var headers: [String] = []
  /// Name and password for basic authentication.
  var credentials: String?
  /// libcurl itself repeats a request if a kept connection ends without an answer. If a repetition
  /// would be answered differently, set this to use a new connection.
  var isOnce = false
  /// Where to stop reading, for answers that the server does not end.
  var end: LineMark?
}

/// A server's answer.
struct HTTPResponse {
  var status: Int
  var body: [UInt8]
}

/// Why there is no answer; the caller adds the service and the phase.
struct HTTPFailure: Error {
  let code: MooncakeError.Code
  let cause: String
  let remedy: String
  /// Whether the server cannot have seen the request.
  var isUnsent = false

  static var canceled: HTTPFailure {
    HTTPFailure(
      code: .canceled, cause: "given up because it was canceled or the engine was destroyed",
      remedy: "call again if it is still wanted")
  }
}

/// Calls HTTP servers through libcurl. Keeps connections; threads do not wait for each other.
final class HTTPClient: Sendable {
  private let curl: CurlLibrary
  private let tls: TLSFiles
  private let idle = Lock<[HTTPLane]>([])
  private static let idleLimit = 4

  init(tls: TLSFiles) throws(MooncakeError) {
    curl = try CurlLibrary.shared()
    self.tls = tls
  }

  /// Sends a request and waits for the answer.
  func perform(_ request: HTTPRequest, _ call: Call) throws(HTTPFailure) -> HTTPResponse {
    // libcurl's own resolver cannot be interrupted.
    let addresses: [SocketAddress]
    do throws(ResolveError) {
      addresses = try Resolver.resolve(
        request.server.host, port: request.server.port ?? 80, deadline: call.deadline,
        cancellation: call.cancellation)
    } catch {
      if error.isCanceled { throw .canceled }
      throw HTTPFailure(
        code: error.isTimeout ? .timeout : .unresolved,
        cause: "cannot resolve \(request.server.host): \(error)",
        remedy: "check the name and this machine's name service", isUnsent: true)
    }
    guard let lane = idle.withLock({ $0.popLast() }) ?? HTTPLane(curl, tls) else {
      throw HTTPFailure(code: .outOfMemory, cause: "no memory for a client", remedy: "free some")
    }
    let response = try lane.perform(request, addresses, call)
    // A lane that failed is dropped, since its connections may still receive old answers.
    idle.withLock { if $0.count < Self.idleLimit { $0.append(lane) } }
    return response
  }
}
