import MooncakeBase
import MooncakeSystem

/// Metadata in etcd, through its JSON gateway.
package final class EtcdService: MetadataService {
  package let uri: MetadataURI
  package let listingScansAllKeys = false
  package let comparesRevisions = true
  let client: EtcdClient
  private static let pageCount = 500
  static let transactionCount = 128
  /// After this long without an answer, a watch checks whether its member still belongs to the
  /// cluster.
  private static let silenceMilliseconds: UInt64 = 5000

  package init(_ uri: MetadataURI, _ settings: MetadataSettings) throws(MooncakeError) {
    self.uri = uri
    client = try EtcdClient(uri, settings)
  }

  package func get(_ key: String, _ call: Call) throws(MooncakeError) -> String? {
    try getRevised(key, call)?.value
  }

  package func put(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) {
    try ask("/v3/kv/put", "put '\(entry.key)'", call) {
      write(entry, lease, &$0)
    } answer: { _ in
    }
  }

  package func putIfAbsent(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) -> Bool {
    let phase = "put '\(entry.key)' if absent"
    var isRepeated = false
    let isDone = try ask("/v3/kv/txn", phase, call, isRepeated: &isRepeated) { writer in
      writer.name("compare")
      writer.beginArray()
      writer.beginObject()
      writer.member("key", encoded(entry.key))
      writer.member("target", "CREATE")
      writer.member("create_revision", "0")
      writer.endObject()
      writer.endArray()
      writer.name("success")
      writer.beginArray()
      writer.beginObject()
      writer.name("request_put")
      writer.beginObject()
      write(entry, lease, &writer)
      writer.endObject()
      writer.endObject()
      writer.endArray()
    } answer: {
      $0["succeeded"]?.isTrue ?? false
    }
    // An earlier attempt that seemed to fail may have put it.
    if isDone || !isRepeated { return isDone }
    return try get(entry.key, call) == entry.value
  }

  package func delete(_ key: String, _ call: Call) throws(MooncakeError) -> Bool {
    var isRepeated = false
    let isDone = try ask("/v3/kv/deleterange", "delete '\(key)'", call, isRepeated: &isRepeated) {
      $0.member("key", encoded(key))
    } answer: {
      number($0["deleted"]) > 0
    }
    // An earlier attempt that seemed to fail may have deleted it.
    return isDone || isRepeated
  }

  package func list(
    prefix: String, from position: String?, limit: Int, _ call: Call
  ) throws(MooncakeError) -> MetadataPage {
    let phase = "list '\(prefix)'"
    return try ask("/v3/kv/range", phase, call) { writer in
      let start = position.map { Array($0.utf8) + [0] } ?? Self.start(prefix)
      writer.member("key", Base64.encode(start))
      writer.member("range_end", Base64.encode(Self.end(prefix)))
      writer.member("limit", String(max(1, min(limit, Self.pageCount))))
    } answer: { value throws(MooncakeError) in
      var page = MetadataPage(
        entries: [], revision: number(value["header"]?["revision"]), next: nil)
      for element in value["kvs"]?.elements ?? .none {
        page.entries.append(try entry(element, phase))
      }
      if value["more"]?.isTrue == true { page.next = page.entries.last?.key }
      return page
    }
  }

  package func changes(
    prefix: String, since revision: UInt64, _ call: Call
  ) throws(MooncakeError) -> MetadataChanges {
    let phase = "watch '\(prefix)'"
    // A member that is frozen or cut off is as silent as one without changes, and so is one whose
    // long answer has arrived only in part. A member that answers this query knows the latest
    // state.
    if client.silentMilliseconds >= Self.silenceMilliseconds {
      if try !isUnchanged(prefix, since: revision, phase, call) { return .unknown }
    }
    var writer = JSONWriter()
    writer.beginObject()
    writer.name("create_request")
    writer.beginObject()
    writer.member("key", Base64.encode(Self.start(prefix)))
    writer.member("range_end", Base64.encode(Self.end(prefix)))
    writer.member("start_revision", String(revision &+ 1))
    writer.endObject()
    writer.endObject()
    // The answer is a stream of lines; stop at the first one that reports anything.
    let query = EtcdClient.Query(
      path: "/v3/watch", body: writer.text, phase: phase, isWatch: true,
      end: LineMark("\"events\"", "\"canceled\":true", "\"error\""))
    let text: [UInt8]
    do throws(MooncakeError) {
      var isRepeated = false
      text = try client.ask(
        query, call.within(milliseconds: Self.silenceMilliseconds), isRepeated: &isRepeated)
    } catch {
      // Nothing has changed.
      if error.code == .timeout { return .changes([], revision: revision) }
      throw error
    }
    var changes: [MetadataChange] = []
    var latest = revision
    for line in text.split(separator: UInt8(ascii: "\n")) {
      guard try read(Array(line), phase, &changes, &latest) else { return .unknown }
    }
    return .changes(changes, revision: latest)
  }

  /// Whether, as far as the existing keys tell, no key with the prefix was put or deleted after a
  /// revision.
  private func isUnchanged(
    _ prefix: String, since revision: UInt64, _ phase: String, _ call: Call
  ) throws(MooncakeError) -> Bool {
    try ask("/v3/kv/range", phase, call.within(milliseconds: 2 * Self.silenceMilliseconds)) {
      $0.member("key", Base64.encode(Self.start(prefix)))
      $0.member("range_end", Base64.encode(Self.end(prefix)))
      $0.member("min_mod_revision", String(revision &+ 1))
      $0.member("limit", "1")
      $0.name("keys_only")
      $0.value(true)
    } answer: { value in
      // Another cluster, or one that lost its data, counts from the beginning again.
      number(value["header"]?["revision"]) >= revision
        && !(value["kvs"]?.elements ?? .none).contains { _ in true }
    }
  }

  /// Adds the changes of one line; false if the service no longer has the requested revision.
  private func read(
    _ line: [UInt8], _ phase: String, _ changes: inout [MetadataChange], _ latest: inout UInt64
  ) throws(MooncakeError) -> Bool {
    try decode(line, phase) { value throws(MooncakeError) in
      guard let result = value["result"] else {
        throw client.failure(
          .unreachable, phase, "the watch ended: \(value["error"]?["message"]?.string ?? "")",
          "does the cluster have a majority?")
      }
      if result["canceled"]?.isTrue == true {
        if number(result["compact_revision"]) > 0 { return false }
        throw client.failure(
          .unreachable, phase,
          "the watch was canceled: \(result["cancel_reason"]?.string ?? "no reason given")",
          "may the user read these keys?")
      }
      for event in result["events"]?.elements ?? .none {
        guard let pair = event["kv"] else { throw malformed(phase) }
        if event["type"]?.string == "DELETE" {
          changes.append(
            .delete(key: String(decoding: try bytes(pair, "key", phase), as: UTF8.self)))
        } else {
          changes.append(.put(try entry(pair, phase)))
        }
        latest = max(latest, number(pair["mod_revision"]))
      }
      return true
    }
  }

  // MARK: Leases

  package func grant(
    ttlMilliseconds: UInt64, _ call: Call
  ) throws(MooncakeError) -> MetadataLease? {
    let phase = "grant a lease"
    var isRepeated = false
    return try ask("/v3/lease/grant", phase, call, isRepeated: &isRepeated) {
      $0.member("TTL", String((ttlMilliseconds + 999) / 1000))
    } answer: { value throws(MooncakeError) in
      let id = number(value["ID"])
      let seconds = number(value["TTL"])
      if id == 0 || seconds == 0 || seconds > 1 << 32 { throw malformed(phase) }
      return MetadataLease(id: id, ttlMilliseconds: seconds * 1000)
    }
  }

  package func renew(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], strays: inout [String],
    _ call: Call
  ) throws(MooncakeError) -> MetadataRenewal {
    guard let lease else { return .kept }
    let phase = "renew a lease"
    let isAlive = try ask("/v3/lease/keepalive", phase, call) {
      $0.member("ID", String(lease.id))
    } answer: {
      number($0["result"]?["TTL"]) > 0
    }
    if !isAlive { return .gone }
    // A key that somebody else has put since is no longer attached to the lease.
    let (renewal, others) = try ask("/v3/lease/timetolive", phase, call) {
      $0.member("ID", String(lease.id))
      $0.name("keys")
      $0.value(true)
    } answer: { value in
      var held = Set((value["keys"]?.elements ?? .none).compactMap(\.string))
      let lost = entries.map(\.key).filter { held.remove(encoded($0)) == nil }
      return (lost.isEmpty ? MetadataRenewal.kept : .lost(lost), held)
    }
    strays += others.compactMap(Base64.decode).compactMap { String(validating: $0, as: UTF8.self) }
    return renewal
  }

  package func revoke(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], _ call: Call
  ) throws(MooncakeError) {
    guard let lease else { return }
    do throws(MooncakeError) {
      try ask("/v3/lease/revoke", "revoke a lease", call) {
        $0.member("ID", String(lease.id))
      } answer: { _ in
      }
    } catch {
      if error.code != .notFound { throw error }
    }
  }

  // MARK: JSON

  private func write(
    _ entry: MetadataEntry, _ lease: MetadataLease?, _ writer: inout JSONWriter
  ) {
    writer.member("key", encoded(entry.key))
    writer.member("value", encoded(entry.value))
    if let lease { writer.member("lease", String(lease.id)) }
  }

  func encoded(_ text: String) -> String { Base64.encode(text.utf8) }

  private static func start(_ prefix: String) -> [UInt8] {
    prefix.isEmpty ? [0] : Array(prefix.utf8)
  }

  /// The first key after all those with the prefix. The last byte can always be incremented: UTF-8
  /// never contains 0xFF.
  private static func end(_ prefix: String) -> [UInt8] {
    var bytes = Array(prefix.utf8)
    guard let last = bytes.popLast() else { return [0] }
    return bytes + [last + 1]
  }

  /// The gateway writes integers as strings and omits zeros.
  func number(_ value: JSONValue?) -> UInt64 {
    value?.string.flatMap { UInt64($0) } ?? value?.unsigned ?? 0
  }

  func bytes(
    _ pair: JSONValue, _ name: String, _ phase: String
  ) throws(MooncakeError) -> [UInt8] {
    guard let bytes = Base64.decode(pair[name]?.string ?? "") else { throw malformed(phase) }
    return bytes
  }

  private func entry(_ pair: JSONValue, _ phase: String) throws(MooncakeError) -> MetadataEntry {
    MetadataEntry(
      key: String(decoding: try bytes(pair, "key", phase), as: UTF8.self),
      value: String(decoding: try bytes(pair, "value", phase), as: UTF8.self))
  }

  func malformed(_ phase: String) -> MooncakeError {
    client.failure(
      .protocolViolation, phase, "the answer lacks expected members", "is this etcd?")
  }

  private func decode<Result>(
    _ text: [UInt8], _ phase: String, _ body: (JSONValue) throws(MooncakeError) -> Result
  ) throws(MooncakeError) -> Result {
    let document: JSONDocument
    do throws(JSONError) {
      document = try JSONDocument(parsing: text)
    } catch {
      throw client.failure(
        .protocolViolation, phase, "the answer is not JSON: \(error)", "is this etcd?")
    }
    return try document.read(body)
  }

  func ask<Result>(
    _ path: String, _ phase: String, _ call: Call,
    _ write: (inout JSONWriter) -> Void,
    answer: (JSONValue) throws(MooncakeError) -> Result
  ) throws(MooncakeError) -> Result {
    let query = EtcdClient.Query(path: path, body: Self.body(write), phase: phase)
    var isRepeated = false
    return try decode(try client.ask(query, call, isRepeated: &isRepeated), phase, answer)
  }

  /// The same for calls whose repetition would be answered differently.
  func ask<Result>(
    _ path: String, _ phase: String, _ call: Call, isRepeated: inout Bool,
    _ write: (inout JSONWriter) -> Void,
    answer: (JSONValue) throws(MooncakeError) -> Result
  ) throws(MooncakeError) -> Result {
    var query = EtcdClient.Query(path: path, body: Self.body(write), phase: phase)
    query.isOnce = true
    return try decode(try client.ask(query, call, isRepeated: &isRepeated), phase, answer)
  }

  private static func body(_ write: (inout JSONWriter) -> Void) -> String {
    var writer = JSONWriter()
    writer.beginObject()
    write(&writer)
    writer.endObject()
    return writer.text
  }
}
