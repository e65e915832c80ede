import MooncakeSystem
import Synchronization

/// Asks the JSON gateway of an etcd cluster: endpoint by endpoint until one answers, with a token
/// where there is a user.
final class EtcdClient: Sendable {
  let uri: MetadataURI
  private let client: HTTPClient
  private let user: String?
  private let password: String
  private let isSecure: Bool

  private struct State: Sendable {
    /// The endpoint that answered last.
    var endpoint = 0
    /// When, on `Clock`.
    var answered: UInt64 = 0
    var token: String?
  }
  private let state = Lock(State())

  /// One endpoint may take so long while there are others.
  private static let attemptMilliseconds: UInt64 = 5000

  init(_ uri: MetadataURI, _ settings: MetadataSettings) throws(EngineError) {
    self.uri = uri
    let tls = uri.tls.filled(from: settings)
    client = try HTTPClient(tls: tls)
    user = uri.user ?? settings.user
    password = uri.password ?? settings.password ?? ""
    isSecure = uri.isSecure || tls != TLSFiles()
  }

  /// Milliseconds since an endpoint has answered.
  var silentMilliseconds: UInt64 {
    let now = Clock.now()
    return state.withLock { now > $0.answered ? (now - $0.answered) / 1_000_000 : 0 }
  }

  /// What a call is about.
  struct Query {
    var path: String
    var body: String
    var phase: String
    /// Whether the answer may be long in coming, so that its lateness says nothing.
    var isWatch = false
    var end: LineMark?
  }

  /// The answer's text. Whoever repeats after `isRepeated` was set cannot tell whether an earlier
  /// attempt took effect.
  func ask(
    _ query: Query, _ call: MetadataCall, isRepeated: inout Bool
  ) throws(EngineError) -> [UInt8] {
    let count = uri.endpoints.count
    let first = state.withLock { $0.endpoint }
    var failures: [String] = []
    var last: EngineError?
    for step in 0..<count {
      let index = (first + step) % count
      let remaining = call.deadline.remainingNanoseconds / 1_000_000
      let share = max(1, remaining / UInt64(count - step))
      let attempt =
        query.isWatch || step == count - 1
        ? call : call.within(milliseconds: min(share, Self.attemptMilliseconds))
      do throws(EngineError) {
        let answer = try ask(query, at: uri.endpoints[index], attempt)
        state.withLock {
          $0.endpoint = index
          $0.answered = Clock.now()
        }
        return answer
      } catch {
        last = error
        failures.append(error.message)
        // What another endpoint would answer alike.
        let isEndpoints = [.unreachable, .timeout, .unresolved, .accessDenied].contains(error.code)
        if !isEndpoints || error.code == .accessDenied && !isCertificate(error) { break }
        if call.deadline.hasPassed { break }
        isRepeated = true
      }
    }
    guard let last else { throw failure(.invalidArgument, query.phase, "no endpoint", "name one") }
    if failures.count == 1 { throw last }
    throw EngineError(last.code, failures.joined(separator: "; "))
  }

  /// A certificate belongs to one endpoint, a password to the cluster.
  private func isCertificate(_ error: EngineError) -> Bool {
    error.message.utf8.holds("certificate files")
  }

  private func ask(
    _ query: Query, at endpoint: HostPort, _ call: MetadataCall
  ) throws(EngineError) -> [UInt8] {
    for isRetry in [false, true] {
      let token = try token(at: endpoint, call, isStale: isRetry)
      let response = try send(query, at: endpoint, token: token, call)
      if response.status == 200 { return response.body }
      let reason = reason(response)
      if user != nil && !isRetry && wantsLogin(response, reason) { continue }
      throw refusal(response.status, reason, query.phase, endpoint)
    }
    throw failure(.accessDenied, query.phase, "its tokens end at once", "check the clocks")
  }

  /// Whether a new token may help: the old one has ended, the cluster has restarted, its users have
  /// been changed, or it has users only since then.
  private func wantsLogin(_ response: HTTPResponse, _ reason: String) -> Bool {
    response.status == 401
      || [
        "invalid auth token", "auth store is old", "revision in header is old",
        "user name is empty", "token is expired", "token has expired", "unauthenticated",
        "Unauthenticated",
      ].contains { reason.utf8.holds($0) }
  }

  private func token(
    at endpoint: HostPort, _ call: MetadataCall, isStale: Bool
  ) throws(EngineError) -> String? {
    guard let user else { return nil }
    if !isStale, let token = state.withLock({ $0.token }) { return token }
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("name", user)
    writer.member("password", password)
    writer.endObject()
    let query = Query(path: "/v3/auth/authenticate", body: writer.text, phase: "authenticate")
    let response = try send(query, at: endpoint, token: nil, call)
    if response.status != 200 {
      let reason = reason(response)
      // A cluster without users needs no token.
      if reason.utf8.holds("authentication is not enabled") { return nil }
      throw refusal(response.status, reason, query.phase, endpoint)
    }
    let answer = try? JSONDocument(parsing: response.body)
    guard let token = answer?.read({ $0["token"]?.string }) else {
      throw failure(.protocolViolation, query.phase, "the answer has no token", "is this etcd?")
    }
    state.withLock { $0.token = token }
    return token
  }

  private func send(
    _ query: Query, at endpoint: HostPort, token: String?, _ call: MetadataCall
  ) throws(EngineError) -> HTTPResponse {
    var request = HTTPRequest(
      method: .post, server: endpoint, isSecure: isSecure, target: query.path,
      body: Array(query.body.utf8), headers: ["Content-Type: application/json"])
    if let token { request.headers.append("Authorization: \(token)") }
    request.end = query.end
    do throws(HTTPFailure) {
      return try client.perform(request, call)
    } catch {
      throw failure(error.code, query.phase, "\(endpoint): \(error.cause)", error.remedy)
    }
  }

  private func reason(_ response: HTTPResponse) -> String {
    let document = try? JSONDocument(parsing: response.body)
    let text = document?.read { ($0["error"] ?? $0["message"])?.string }
    return text ?? String(decoding: response.body.prefix(200), as: UTF8.self)
  }

  private func refusal(
    _ status: Int, _ reason: String, _ phase: String, _ endpoint: HostPort
  ) -> EngineError {
    let cause = "\(endpoint) answers '\(reason)' (status \(status))"
    func says(_ words: String...) -> Bool { words.contains { reason.utf8.holds($0) } }
    if says("CommonName of client", "common name") {
      return failure(
        .accessDenied, phase, cause,
        "with users, etcd's JSON gateway takes no certificate with a common name: give a client "
          + "certificate without one (CN), and user and password")
    }
    if says("lease not found") {
      return failure(.notFound, phase, cause, "the lease has ended; it is made anew")
    }
    if says(
      "authentication failed", "user name is empty", "permission denied", "invalid auth token",
      "user name not found", "role name not found") || [401, 403].contains(status)
    {
      return failure(
        .accessDenied, phase, cause,
        "give the right user and password, and that user the right to the keys")
    }
    if says("request is too large", "message larger than max") {
      return failure(
        .full, phase, cause,
        "etcd takes 1.5 MiB in one request: register fewer and larger buffers, or raise its "
          + "--max-request-bytes")
    }
    if says("database space exceeded") {
      return failure(.full, phase, cause, "compact and defragment etcd, or raise its quota")
    }
    if says("no leader", "timed out", "leader changed", "Unavailable", "connection refused")
      || status >= 500
    {
      return failure(.unreachable, phase, cause, "does the cluster have a majority?")
    }
    if status == 404 {
      return failure(
        .protocolViolation, phase, cause,
        "there is no JSON gateway: start etcd without --enable-grpc-gateway=false, and update one "
          + "before 3.4")
    }
    return failure(.protocolViolation, phase, cause, "is this etcd 3.4 or newer?")
  }

  func failure(
    _ code: EngineError.Code, _ phase: String, _ cause: String, _ remedy: String
  ) -> EngineError {
    EngineError(code, "metadata \(uri): \(phase): \(cause): \(remedy)")
  }
}
