import MooncakeBase
import MooncakeSystem
import Synchronization

/// Calls the JSON gateway of an etcd cluster: tries one endpoint after another until one answers;
/// logs in if there is a user.
final class EtcdClient: Sendable {
  let uri: MetadataURI
  private let client: HTTPClient
  private let user: String?
  private let password: String
  private let isSecure: Bool

  private struct State: Sendable {
    /// The endpoint that answered last.
    var endpoint = 0
    /// When it answered, on `Clock`.
    var answered: UInt64 = 0
    var token: String?
  }
  private let state = Lock(State())

  /// Longest time for one endpoint while there are others to try.
  private static let attemptMilliseconds: UInt64 = 5000

  init(_ uri: MetadataURI, _ settings: MetadataSettings) throws(MooncakeError) {
    self.uri = uri
    let tls = uri.tls.filled(from: settings)
    client = try HTTPClient(tls: tls)
    user = uri.user ?? settings.user
    password = uri.password ?? settings.password ?? ""
    isSecure = uri.isSecure || tls != TLSFiles()
  }

  /// Milliseconds since any endpoint last answered.
  var silentMilliseconds: UInt64 {
    let now = Clock.now()
    return state.withLock { now > $0.answered ? (now - $0.answered) / 1_000_000 : 0 }
  }

  /// A call to the gateway.
  struct Query {
    var path: String
    var body: String
    var phase: String
    /// Whether the answer may take long, so that a late one does not mean a dead endpoint.
    var isWatch = false
    /// As in `HTTPRequest`.
    var isOnce = false
    var end: LineMark?
  }

  /// The answer's text. `isRepeated` is set if an attempt failed that may still have taken effect.
  func ask(
    _ query: Query, _ call: Call, isRepeated: inout Bool
  ) throws(MooncakeError) -> [UInt8] {
    let count = uri.endpoints.count
    let first = state.withLock { $0.endpoint }
    var failures: [String] = []
    var last: MooncakeError?
    for step in 0..<count {
      let index = (first + step) % count
      let remaining = call.deadline.remainingNanoseconds / 1_000_000
      let share = max(1, remaining / UInt64(count - step))
      let attempt =
        query.isWatch || step == count - 1
        ? call : call.within(milliseconds: min(share, Self.attemptMilliseconds))
      do throws(MooncakeError) {
        let answer = try ask(query, at: uri.endpoints[index], attempt, isRepeated: &isRepeated)
        state.withLock {
          $0.endpoint = index
          $0.answered = Clock.now()
        }
        return answer
      } catch {
        last = error
        failures.append(error.message)
        // Stop on errors that every endpoint would give.
        let isEndpoints = [.unreachable, .timeout, .unresolved, .accessDenied].contains(error.code)
        if !isEndpoints || error.code == .accessDenied && !isCertificate(error) { break }
        if call.deadline.hasPassed { break }
      }
    }
    guard let last else { throw failure(.invalidArgument, query.phase, "no endpoint", "name one") }
    if failures.count == 1 { throw last }
    throw MooncakeError(last.code, failures.joined(separator: "; "))
  }

  /// Certificates differ by endpoint; a refused password is refused by the whole cluster.
  private func isCertificate(_ error: MooncakeError) -> Bool {
    error.message.utf8.holds("certificate files")
  }

  private func ask(
    _ query: Query, at endpoint: HostPort, _ call: Call, isRepeated: inout Bool
  ) throws(MooncakeError) -> [UInt8] {
    for isRetry in [false, true] {
      let token = try token(at: endpoint, call, isStale: isRetry)
      var isUnsent = false
      let response: HTTPResponse
      do throws(MooncakeError) {
        response = try send(query, at: endpoint, token: token, call, isUnsent: &isUnsent)
      } catch {
        if !isUnsent { isRepeated = true }
        throw error
      }
      if response.status == 200 { return response.body }
      // The member may have timed out waiting for the others, and the change may still happen.
      if response.status >= 500 { isRepeated = true }
      if user != nil && !isRetry && wantsLogin(response) { continue }
      throw refusal(response, token, query.phase, endpoint)
    }
    throw failure(.unreachable, query.phase, "its tokens expire at once", "check the clocks")
  }

  /// Whether a new token may help: the old one has expired, the cluster has restarted, or its users
  /// were changed or enabled since.
  private func wantsLogin(_ response: HTTPResponse) -> Bool {
    let reason = reason(response)
    return response.status == 401 || EtcdRefusal.isStaleToken(reason)
      || ["user name is empty", "unauthenticated", "Unauthenticated"].contains {
        reason.utf8.holds($0)
      }
  }

  private func token(
    at endpoint: HostPort, _ call: Call, isStale: Bool
  ) throws(MooncakeError) -> String? {
    guard let user else { return nil }
    if !isStale, let token = state.withLock({ $0.token }) { return token }
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("name", user)
    writer.member("password", password)
    writer.endObject()
    let query = Query(path: "/v3/auth/authenticate", body: writer.text, phase: "authenticate")
    var isUnsent = false
    let response = try send(query, at: endpoint, token: nil, call, isUnsent: &isUnsent)
    if response.status != 200 {
      // A cluster without authentication needs no token.
      if reason(response).utf8.holds("authentication is not enabled") { return nil }
      throw refusal(response, nil, query.phase, endpoint)
    }
    let answer = try? JSONDocument(parsing: response.body)
    guard let token = answer?.read({ $0["token"]?.string }) else {
      throw failure(.protocolViolation, query.phase, "the answer has no token", "is this etcd?")
    }
    state.withLock { $0.token = token }
    return token
  }

  private func send(
    _ query: Query, at endpoint: HostPort, token: String?, _ call: Call,
    isUnsent: inout Bool
  ) throws(MooncakeError) -> HTTPResponse {
    var request = HTTPRequest(
      method: .post, server: endpoint, isSecure: isSecure, target: query.path,
      body: Array(query.body.utf8), headers: ["Content-Type: application/json"])
    if let token { request.headers.append("Authorization: \(token)") }
    request.end = query.end
    request.isOnce = query.isOnce
    do throws(HTTPFailure) {
      return try client.perform(request, call)
    } catch {
      isUnsent = error.isUnsent
      throw failure(error.code, query.phase, "\(endpoint): \(error.cause)", error.remedy)
    }
  }

  /// The reason in the service's words, possibly with secrets.
  private func reason(_ response: HTTPResponse) -> String {
    let document = try? JSONDocument(parsing: response.body)
    return document?.read { ($0["error"] ?? $0["message"])?.string }
      ?? String(decoding: response.body.prefix(Self.quotedBytes), as: UTF8.self)
  }

  /// Bytes of an answer that are searched for its reason.
  private static let quotedBytes = 4096
  private static let shownCount = 400

  /// `token` is the one that was sent; it is hidden in the message.
  private func refusal(
    _ response: HTTPResponse, _ token: String?, _ phase: String, _ endpoint: HostPort
  ) -> MooncakeError {
    let reason = reason(response)
    let shown = ServiceSecrets(password, token).hidden(in: reason.utf8).prefix(Self.shownCount)
    let cause = "\(endpoint) answers '\(shown)' (status \(response.status))"
    let meaning = EtcdRefusal.meaning(response.status, reason)
    return failure(meaning.code, phase, cause, meaning.remedy)
  }

  func failure(
    _ code: MooncakeError.Code, _ phase: String, _ cause: String, _ remedy: String
  ) -> MooncakeError {
    MooncakeError(code, "metadata \(uri): \(phase): \(cause): \(remedy)")
  }
}
