import MooncakeBase
import MooncakeSystem
import Synchronization

/// Metadata on an HTTP server with `GET`, `PUT` and `DELETE`. Leases, listings and changes need
/// `mooncake metadata serve` as the server.
package final class HTTPService: MetadataService {
  package let uri: MetadataURI
  /// Our server counts changes, but neither tells which of them wrote a key nor compares them.
  package let listingScansAllKeys = false
  package let comparesRevisions = false
  private let client: HTTPClient
  private let credentials: String?
  /// Used instead of name and password.
  private let token: MetadataToken?
  private let secrets: ServiceSecrets
  private let renewals = Atomic(0)
  /// Every so many renewals, compare the keys' names and not only their number.
  private static let comparedRenewals = 4
  /// Bytes of an answer that are searched for its reason.
  private static let quotedBytes = 4096
  /// Keys and bytes of one request for values, within the server's limits.
  private static let valueCount = 1000
  private static let questionBytes = 1 << 20
  /// How much longer than its wait a server's answer may take.
  private static let answerMilliseconds: UInt64 = 500

  package init(_ uri: MetadataURI, _ settings: MetadataSettings) throws(MooncakeError) {
    self.uri = uri
    if !uri.isSecure && settings.tls != TLSFiles() {
      Log.warning(
        "metadata \(uri): the connection is unencrypted, and the certificate files in "
          + "MC_METADATA_CA_FILE, ..._CERT_FILE and ..._KEY_FILE are not used: use https:// if the "
          + "service has TLS")
    }
    client = try HTTPClient(tls: uri.tls.filled(from: settings))
    // The URI takes precedence.
    let token = uri.user == nil ? settings.token : nil
    self.token = try token.map { text throws(MooncakeError) in
      try MetadataToken(text, from: MetadataToken.variable)
    }
    let user = uri.user ?? (token == nil ? settings.user : nil)
    let password = uri.password ?? settings.password
    credentials = user.map { "\($0):\(password ?? "")" }
    secrets = ServiceSecrets(
      token, password, credentials.map { Base64.encode($0.utf8) })
  }

  package func get(_ key: String, _ call: Call) throws(MooncakeError) -> String? {
    let phase = "get '\(key)'"
    guard let bytes = try bytes(key, phase, call) else { return nil }
    guard let text = String(validating: bytes, as: UTF8.self) else {
      throw failure(
        .protocolViolation, phase, "the value is not UTF-8", "remove the key, or correct it")
    }
    return text
  }

  private func bytes(
    _ key: String, _ phase: String, _ call: Call
  ) throws(MooncakeError) -> [UInt8]? {
    let response = try ask(.get, ["key": key], phase, call)
    if response.status == 404 { return nil }
    try expectSuccess(response, phase)
    return response.body
  }

  package func put(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) {
    let phase = "put '\(entry.key)'"
    let body = Array(entry.value.utf8)
    let parameters = parameters(entry.key, lease)
    var response = try ask(.put, parameters, phase, call, body: body)
    if response.status == 400 && entry.key.utf8.holds("rpc_meta") {
      // Mooncake's servers refuse to replace the route of a process, even a dead one.
      _ = try delete(entry.key, call)
      response = try ask(.put, parameters, phase, call, body: body)
    }
    try expectSuccess(response, phase, lease: lease)
  }

  package func putIfAbsent(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) -> Bool {
    let phase = "put '\(entry.key)' if absent"
    var parameters = parameters(entry.key, lease)
    parameters["absent"] = "1"
    // Check that it is our server: others would ignore the parameter and replace the value.
    _ = try page(prefix: entry.key, from: nil, phase, limit: 1, call)
    let response = try ask(
      .put, parameters, phase, call, body: Array(entry.value.utf8), isOnce: true)
    if response.status == 409 { return false }
    try expectSuccess(response, phase, lease: lease)
    return true
  }

  package func delete(_ key: String, _ call: Call) throws(MooncakeError) -> Bool {
    let phase = "delete '\(key)'"
    let response = try ask(.delete, ["key": key], phase, call, isOnce: true)
    if response.status == 404 { return false }
    try expectSuccess(response, phase)
    return true
  }

  // MARK: What only our server has

  package func values(
    of keys: [String], _ call: Call
  ) throws(MooncakeError) -> [String?] {
    let phase = "get keys"
    var values: [String?] = []
    while values.count < keys.count {
      let (part, question) = Self.question(for: keys[values.count...])
      let response = try ask(.post, [:], phase, call, at: "/values", body: question)
      if Self.isUnknown(response) {
        for key in keys[values.count...] {
          let bytes = try bytes(key, "get '\(key)'", call)
          values.append(bytes.map { String(decoding: $0, as: UTF8.self) })
        }
        return values
      }
      try expectSuccess(response, phase)
      let count = values.count
      try decode(response, phase) { value throws(MooncakeError) in
        for (key, element) in zip(part, value["values"]?.elements ?? .none) {
          let isThere = element["value"] != nil || element["value_base64"] != nil
          values.append(isThere ? try entry(element, key: key, phase).value : nil)
        }
      }
      if values.count == count { throw malformed(phase) }
    }
    return values
  }

  /// The body of a request for the first keys, as many as fit.
  private static func question(
    for keys: ArraySlice<String>
  ) -> (part: ArraySlice<String>, text: [UInt8]) {
    var writer = JSONWriter()
    writer.beginArray()
    var count = 0
    while count < min(keys.count, valueCount), writer.byteCount < questionBytes {
      writer.value(keys[keys.startIndex + count])
      count += 1
    }
    writer.endArray()
    return (keys.prefix(count), Array(writer.text.utf8))
  }

  package func list(
    prefix: String, from position: String?, limit: Int, _ call: Call
  ) throws(MooncakeError) -> MetadataPage {
    try page(
      prefix: prefix, from: position, "list '\(prefix)'", limit: max(1, min(limit, 1000)), call)
  }

  private func page(
    prefix: String, from position: String?, _ phase: String, limit: Int, _ call: Call
  ) throws(MooncakeError) -> MetadataPage {
    var parameters = ["prefix": prefix, "limit": String(limit)]
    parameters["after"] = position
    let response = try ask(.get, parameters, phase, call)
    // Other servers say that the key is missing.
    if [400, 404, 405].contains(response.status) {
      throw failure(
        .unsupported, phase, "this server only gets, puts and deletes",
        "use mooncake metadata serve, etcd or Redis")
    }
    try expectSuccess(response, phase)
    return try decode(response, phase) { value throws(MooncakeError) in
      guard let revision = value["revision"]?.unsigned, let list = value["entries"] else {
        throw malformed(phase)
      }
      var entries: [MetadataEntry] = []
      for element in list.elements { entries.append(try entry(element, phase)) }
      let isCut = value["more"]?.unsigned == 1
      return MetadataPage(
        entries: entries, revision: revision, next: isCut ? entries.last?.key : nil)
    }
  }

  package func changes(
    prefix: String, since revision: UInt64, _ call: Call
  ) throws(MooncakeError) -> MetadataChanges {
    let phase = "watch '\(prefix)'"
    // Make the server answer before the client gives up.
    let left = call.deadline.remainingNanoseconds / 1_000_000
    let wait = min(30_000, left - min(left / 2, Self.answerMilliseconds))
    let parameters = ["prefix": prefix, "since": String(revision), "wait_ms": String(wait)]
    let response: HTTPResponse
    do throws(MooncakeError) {
      response = try ask(.get, parameters, phase, call)
    } catch {
      // A server that does not even report "no changes" hangs, or its answer takes longer than the
      // whole call, and repeating the request would never end. Too short a wait proves neither.
      if error.code == .timeout && left - wait < Self.answerMilliseconds * 3 / 4 {
        return .changes([], revision: revision)
      }
      throw error
    }
    if response.status == 410 { return .unknown }
    try expectSuccess(response, phase)
    return try decode(response, phase) { value throws(MooncakeError) in
      guard let revision = value["revision"]?.unsigned, let list = value["changes"] else {
        throw malformed(phase)
      }
      var changes: [MetadataChange] = []
      for element in list.elements {
        if element["deleted"] != nil {
          guard let key = element["key"]?.string else { throw malformed(phase) }
          changes.append(.delete(key: key))
        } else {
          changes.append(.put(try entry(element, phase)))
        }
      }
      return .changes(changes, revision: revision)
    }
  }

  package func grant(
    ttlMilliseconds: UInt64, _ call: Call
  ) throws(MooncakeError) -> MetadataLease? {
    let phase = "grant a lease"
    let response = try ask(
      .post, ["ttl_ms": String(ttlMilliseconds)], phase, call, at: "/lease", isOnce: true)
    if response.status == 400 && response.body.starts(with: "ttl_ms".utf8) {
      throw failure(
        .invalidArgument, phase, "\(ttlMilliseconds) ms is not a time that the server grants",
        "say 100 ms to an hour")
    }
    if Self.isUnknown(response) { return nil }
    try expectSuccess(response, phase)
    return try decode(response, phase) { value throws(MooncakeError) in
      guard let text = value["lease"]?.string, let id = UInt64(text),
        let ttl = value["ttl_ms"]?.unsigned
      else { throw malformed(phase) }
      return MetadataLease(id: id, ttlMilliseconds: ttl)
    }
  }

  package func renew(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], strays: inout [String],
    _ call: Call
  ) throws(MooncakeError) -> MetadataRenewal {
    guard let lease else {
      // Without leases, only reading a key tells whether the server has lost everything.
      guard let first = entries.first else { return .kept }
      return try get(first.key, call) == first.value ? .kept : .gone
    }
    let phase = "renew a lease"
    let response = try ask(.post, ["id": String(lease.id)], phase, call, at: "/lease")
    if response.status == 404 { return .gone }
    try expectSuccess(response, phase)
    let count = try decode(response, phase) { value throws(MooncakeError) in
      guard let count = value["keys"]?.unsigned else { throw malformed(phase) }
      return count
    }
    // Even if the number is right, one key may be lost and another one a stray.
    let renewal = renewals.wrappingAdd(1, ordering: .relaxed).oldValue
    if count == UInt64(entries.count) && renewal % Self.comparedRenewals != 0 { return .kept }
    if count >= UInt64(entries.count) {
      var held = Set(try keys(of: lease, call).map { MetadataKey($0) })
      if held.isEmpty { return .kept }
      let lost = entries.map(\.key).filter { held.remove(MetadataKey($0)) == nil }
      strays += held.map(\.text)
      return lost.isEmpty ? .kept : .lost(lost)
    }
    let values = try values(of: entries.map(\.key), call)
    let lost = zip(entries, values).filter { $0.value != $1 }.map(\.0.key)
    // If all values are as they were put, one of them is attached to another lease.
    return .lost(lost.isEmpty ? entries.map(\.key) : lost)
  }

  /// The keys of a lease; empty from older servers, which do not tell.
  private func keys(
    of lease: MetadataLease, _ call: Call
  ) throws(MooncakeError) -> [String] {
    let phase = "list the keys of a lease"
    var keys: [String] = []
    while true {
      var parameters = ["id": String(lease.id)]
      parameters["after"] = keys.last
      let response = try ask(.get, parameters, phase, call, at: "/lease")
      if [400, 404, 405, 501].contains(response.status) { return keys }
      try expectSuccess(response, phase)
      let (names, isCut) = try decode(response, phase) { value in
        ((value["names"]?.elements ?? .none).compactMap(\.string), value["more"]?.unsigned == 1)
      }
      keys += names
      if !isCut || names.isEmpty { return keys }
    }
  }

  package func revoke(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], _ call: Call
  ) throws(MooncakeError) {
    if let lease {
      let phase = "revoke a lease"
      let response = try ask(.delete, ["id": String(lease.id)], phase, call, at: "/lease")
      if response.status != 404 { try expectSuccess(response, phase) }
      return
    }
    for entry in entries { try deleteUnchanged(entry, call) }
  }

  /// Deletes a key if it has a certain value. Atomic on our server; on others it takes two steps,
  /// and a value put in between is deleted, too.
  private func deleteUnchanged(
    _ entry: MetadataEntry, _ call: Call
  ) throws(MooncakeError) {
    let phase = "delete '\(entry.key)' if unchanged"
    let response = try ask(
      .post, ["key": entry.key], phase, call, at: "/delete", body: Array(entry.value.utf8))
    if !Self.isUnknown(response) { return try expectSuccess(response, phase) }
    let value = try bytes(entry.key, "get '\(entry.key)'", call)
    if let value, value.elementsEqual(entry.value.utf8) { _ = try delete(entry.key, call) }
  }

  /// Whether the server does not support the request, like others and older releases of ours.
  private static func isUnknown(_ response: HTTPResponse) -> Bool {
    [400, 404, 405, 501].contains(response.status)
  }

  // MARK: Requests

  private func parameters(_ key: String, _ lease: MetadataLease?) -> [String: String] {
    var parameters = ["key": key]
    if let lease { parameters["lease"] = String(lease.id) }
    return parameters
  }

  private func ask(
    _ method: HTTPRequest.Method, _ parameters: [String: String], _ phase: String,
    _ call: Call, at subpath: String = "", body: [UInt8]? = nil, isOnce: Bool = false
  ) throws(MooncakeError) -> HTTPResponse {
    let query = parameters.map { "\($0.key)=\(PercentEncoding.encode($0.value))" }
    var request = HTTPRequest(
      method: method, server: uri.endpoints[0], isSecure: uri.isSecure,
      target: uri.path + subpath
        + (query.isEmpty ? "" : "?\(query.joined(separator: "&"))"))
    request.credentials = credentials
    if let token { request.headers = [token.header] }
    request.isOnce = isOnce
    if method == .post && body == nil { request.body = [] }
    if let body {
      request.body = body
      request.headers.append("Content-Type: application/json")
    }
    do throws(HTTPFailure) {
      return try client.perform(request, call)
    } catch {
      throw failure(error.code, phase, error.cause, error.remedy)
    }
  }

  private func expectSuccess(
    _ response: HTTPResponse, _ phase: String, lease: MetadataLease? = nil
  ) throws(MooncakeError) {
    if response.status == 200 { return }
    let text =
      secrets.hidden(in: response.body.prefix(Self.quotedBytes))
      .split(whereSeparator: \.isNewline).first.map { " (\($0.prefix(200)))" } ?? ""
    let cause = "the server answers with status \(response.status)\(text)"
    switch response.status {
    case 401, 403:
      throw failure(.accessDenied, phase, cause, authorizationRemedy)
    case 412 where lease != nil:
      throw failure(.notFound, phase, cause, "the lease has ended; a new one is requested")
    case 413: throw failure(.full, phase, cause, "register fewer and larger buffers")
    case 507: throw failure(.full, phase, cause, "give the server more memory or disk")
    case let status where HTTPRefusal.isPassing(status):
      throw failure(.unreachable, phase, cause, "look at the server's log")
    default:
      throw failure(
        .protocolViolation, phase, cause, "is this the URI of a metadata server, with its path?")
    }
  }

  private var authorizationRemedy: String {
    let variable = MetadataToken.variable
    if token != nil { return "\(variable) must be the same here as at the server" }
    let isNamed = credentials != nil
    return "a server with a token needs the same \(variable) here\(isNamed ? " and no user" : ""), "
      + "another one the right user and password"
  }

  private func malformed(_ phase: String) -> MooncakeError {
    failure(
      .protocolViolation, phase, "the answer lacks expected members",
      "is this the URI of a metadata server?")
  }

  private func decode<Result>(
    _ response: HTTPResponse, _ phase: String,
    _ body: (JSONValue) throws(MooncakeError) -> Result
  ) throws(MooncakeError) -> Result {
    let document: JSONDocument
    do throws(JSONError) {
      document = try JSONDocument(parsing: response.body)
    } catch {
      throw failure(
        .protocolViolation, phase, "the answer is not JSON: \(error)",
        "is this the URI of a metadata server?")
    }
    return try document.read(body)
  }

  /// Values that JSON text cannot carry arrive as Base64; one that is not UTF-8 is an error.
  private func entry(
    _ value: JSONValue, _ phase: String
  ) throws(MooncakeError) -> MetadataEntry {
    guard let key = value["key"]?.string else { throw malformed(phase) }
    return try entry(value, key: key, phase)
  }

  private func entry(
    _ value: JSONValue, key: String, _ phase: String
  ) throws(MooncakeError) -> MetadataEntry {
    if let text = value["value"]?.string { return MetadataEntry(key: key, value: text) }
    guard let bytes = value["value_base64"]?.string.flatMap(Base64.decode) else {
      throw malformed(phase)
    }
    return MetadataEntry(key: key, value: String(decoding: bytes, as: UTF8.self))
  }
}

extension TLSFiles {
  /// Fills in from the environment what the URI does not say.
  func filled(from settings: MetadataSettings) -> TLSFiles {
    TLSFiles(
      authority: authority ?? settings.tls.authority,
      certificate: certificate ?? settings.tls.certificate, key: key ?? settings.tls.key)
  }
}
