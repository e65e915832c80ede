import MooncakeBase
import MooncakeSystem

/// What a metadata server does for each request: the rules of Mooncake's servers, plus leases,
/// listings and waits for changes. Works on the table and collects what the journal must keep.
struct MetadataRules {
  typealias Answer = MetadataExchange.Answer

  var table: MetadataTable
  /// Changes that the journal has not taken yet.
  var records: [MetadataJournal.Record] = []
  private static let pageBytes = 4 << 20
  private static let leaseMilliseconds: ClosedRange<UInt64> = 100...3_600_000
  private static let waitMilliseconds: UInt64 = 60_000

  init(table: MetadataTable) { self.table = table }

  /// The answer to a request; nil if it waits for changes, described by its `watch`.
  mutating func answer(
    _ exchange: MetadataExchange, parameter: (String) -> Parameter, now: UInt64
  ) -> Answer? {
    switch (exchange.path, exchange.method) {
    case ("/metadata", .get): return get(exchange, parameter, now)
    case ("/metadata", .put): return put(exchange, parameter)
    case ("/metadata", .delete): return delete(parameter)
    case ("/metadata/values", .post): return values(exchange)
    case ("/metadata/delete", .post): return deleteIfUnchanged(exchange, parameter)
    case ("/metadata/lease", .post): return postLease(parameter, now)
    case ("/metadata/lease", .get): return listLease(parameter)
    case ("/metadata/lease", .delete): return deleteLease(parameter)
    case ("/health", .get): return health()
    case ("/metadata", _), ("/metadata/lease", _), ("/metadata/values", _),
      ("/metadata/delete", _), ("/health", _):
      return Answer(405, "method not allowed\n")
    default:
      return Answer(
        404,
        "no such path: use /metadata, below it /lease, /values or /delete, or /health\n")
    }
  }

  /// A parameter of the query.
  enum Parameter: Equatable {
    case absent, malformed
    case text(String)

    var text: String? { if case .text(let text) = self { text } else { nil } }
  }

  private static var keyMissing: Answer { Answer(400, "the key is missing, empty or not UTF-8\n") }

  private func key(_ parameter: (String) -> Parameter) -> MetadataKey? {
    guard case .text(let text) = parameter("key"), !text.isEmpty else { return nil }
    return MetadataKey(text)
  }

  /// nil if the parameter is not a number.
  private func number(_ parameter: Parameter, default value: UInt64) -> UInt64? {
    parameter == .absent ? value : parameter.text.flatMap { UInt64($0) }
  }

  // MARK: Keys

  private func get(
    _ exchange: MetadataExchange, _ parameter: (String) -> Parameter, _ now: UInt64
  ) -> Answer? {
    if parameter("key") == .absent, let prefix = parameter("prefix").text {
      if parameter("since") == .absent { return list(prefix, parameter) }
      return watch(exchange, prefix, parameter, now)
    }
    guard let key = key(parameter) else { return Self.keyMissing }
    guard let value = table.value(of: key) else { return Answer(404, "metadata not found\n") }
    return Answer(200, value, isJSON: true)
  }

  /// The values of a list of keys, in order: as many as fit an answer, at least one.
  private func values(_ exchange: MetadataExchange) -> Answer {
    if exchange.isTooLarge { return Answer(413, "too many keys in one request\n") }
    let document = try? JSONDocument(parsing: exchange.body)
    let text: String?? = document?.read { list in list.isArray ? values(of: list.elements) : nil }
    guard let text = text ?? nil else { return Answer(400, "the body is not a list of keys\n") }
    return Answer(200, text, isJSON: true)
  }

  private func values(of keys: JSONElements) -> String {
    var writer = JSONWriter()
    writer.beginObject()
    writer.name("values")
    writer.beginArray()
    var byteCount = 0
    for key in keys {
      let value = key.string.flatMap { table.value(of: MetadataKey($0)) }
      writer.beginObject()
      if let value { write(value, &writer) }
      writer.endObject()
      byteCount += value?.count ?? 0
      if byteCount >= Self.pageBytes { break }
    }
    writer.endArray()
    writer.endObject()
    return writer.text
  }

  private mutating func put(
    _ exchange: MetadataExchange, _ parameter: (String) -> Parameter
  ) -> Answer {
    guard let key = key(parameter) else { return Self.keyMissing }
    guard let lease = number(parameter("lease"), default: 0) else {
      return Answer(400, "the lease is not a number\n")
    }
    let verdict =
      exchange.isTooLarge
      ? .tooLarge
      : table.put(
        key, exchange.body, lease: lease, isOnlyIfAbsent: parameter("absent") == .text("1"))
    switch verdict {
    case .done:
      records.append(.put(key: key.text, value: exchange.body, lease: lease))
      return Answer(200, "metadata updated\n")
    case .exists: return Answer(409, "the key exists\n")
    case .noLease: return Answer(412, "there is no such lease\n")
    case .tooLarge:
      return Answer(
        413,
        "at most \(table.limits.keyBytes) bytes of key and \(table.limits.valueBytes) of "
          + "value\n")
    case .full: return Answer(507, "the server is full with \(table.usedBytes) bytes\n")
    }
  }

  private mutating func delete(_ parameter: (String) -> Parameter) -> Answer {
    guard let key = key(parameter) else { return Self.keyMissing }
    if !table.delete(key) { return Answer(404, "metadata not found\n") }
    records.append(.delete(key: key.text))
    return Answer(200, "metadata deleted\n")
  }

  /// Deletes a key if its value equals the body; any other value stays.
  private mutating func deleteIfUnchanged(
    _ exchange: MetadataExchange, _ parameter: (String) -> Parameter
  ) -> Answer {
    guard let key = key(parameter) else { return Self.keyMissing }
    let isDeleted = !exchange.isTooLarge && table.delete(key, ifItIs: exchange.body)
    if isDeleted { records.append(.delete(key: key.text)) }
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("deleted", isDeleted ? 1 : 0)
    writer.endObject()
    return Answer(200, writer.text, isJSON: true)
  }

  private func list(_ prefix: String, _ parameter: (String) -> Parameter) -> Answer {
    guard let limit = number(parameter("limit"), default: 1000), limit > 0,
      parameter("after") != .malformed
    else { return Answer(400, "limit or after is malformed\n") }
    let (entries, isCut) = table.list(
      prefix: prefix, after: parameter("after").text, limit: Int(min(limit, 10_000)),
      byteLimit: Self.pageBytes)
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("revision", table.revision)
    writer.member("more", isCut ? 1 : 0)
    writer.name("entries")
    writer.beginArray()
    for (key, value) in entries { write(key, value, &writer) }
    writer.endArray()
    writer.endObject()
    return Answer(200, writer.text, isJSON: true)
  }

  /// As text if JSON can carry it, else as Base64.
  private func write(_ key: MetadataKey, _ value: [UInt8]?, _ writer: inout JSONWriter) {
    writer.beginObject()
    writer.member("key", key.text)
    if let value {
      write(value, &writer)
    } else {
      writer.member("deleted", 1)
    }
    writer.endObject()
  }

  private func write(_ value: [UInt8], _ writer: inout JSONWriter) {
    if !value.contains(0), let text = String(validating: value, as: UTF8.self) {
      writer.member("value", text)
    } else {
      writer.member("value_base64", Base64.encode(value))
    }
  }

  // MARK: Changes

  private func watch(
    _ exchange: MetadataExchange, _ prefix: String, _ parameter: (String) -> Parameter,
    _ now: UInt64
  ) -> Answer? {
    guard let since = number(parameter("since"), default: 0),
      let wait = number(parameter("wait_ms"), default: 0)
    else { return Answer(400, "since or wait_ms is not a number\n") }
    exchange.watch = MetadataExchange.Watch(
      prefix: prefix, seen: since,
      end: now &+ min(wait, Self.waitMilliseconds) &* 1_000_000)
    return answer(toWatch: exchange, now: now)
  }

  /// The answer to a waiting request; nil if it goes on waiting.
  func answer(toWatch exchange: MetadataExchange, now: UInt64) -> Answer? {
    guard let watch = exchange.watch else { return nil }
    let isOver = now >= watch.end
    if watch.seen == table.revision && !isOver { return nil }
    // Nothing has matched up to the revision seen, so only later changes matter.
    guard let changes = table.changes(prefix: watch.prefix, since: watch.seen) else {
      return Answer(410, "the changes since then are no longer kept: list again\n")
    }
    if changes.isEmpty && !isOver {
      exchange.watch?.seen = table.revision
      return nil
    }
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("revision", table.revision)
    writer.name("changes")
    writer.beginArray()
    for change in changes { write(change.key, change.value, &writer) }
    writer.endArray()
    writer.endObject()
    return Answer(200, writer.text, isJSON: true)
  }

  // MARK: Leases

  private mutating func postLease(_ parameter: (String) -> Parameter, _ now: UInt64) -> Answer {
    if parameter("id") != .absent {
      guard let id = number(parameter("id"), default: 0) else {
        return Answer(400, "the id is not a number\n")
      }
      guard let lease = table.renew(id, now: now) else {
        return Answer(404, "there is no such lease\n")
      }
      return describe(id, lease.ttlMilliseconds, keyCount: lease.keys.count)
    }
    guard let ttl = number(parameter("ttl_ms"), default: 10_000),
      Self.leaseMilliseconds.contains(ttl)
    else {
      return Answer(
        400,
        "ttl_ms is not a number from \(Self.leaseMilliseconds.lowerBound) to "
          + "\(Self.leaseMilliseconds.upperBound)\n")
    }
    let id = UInt64.random(in: 1...UInt64(Int64.max))
    guard table.grant(id, ttlMilliseconds: ttl, now: now) else {
      return Answer(507, "there are \(table.leases.count) leases already\n")
    }
    records.append(.grant(lease: id, ttlMilliseconds: ttl))
    return describe(id, ttl, keyCount: 0)
  }

  private func describe(_ id: UInt64, _ ttl: UInt64, keyCount: Int) -> Answer {
    var writer = JSONWriter()
    writer.beginObject()
    // As text, because other JSON readers round numbers of this size.
    writer.member("lease", String(id))
    writer.member("ttl_ms", ttl)
    writer.member("keys", UInt64(keyCount))
    writer.endObject()
    return Answer(200, writer.text, isJSON: true)
  }

  /// The keys of a lease, in order.
  private func listLease(_ parameter: (String) -> Parameter) -> Answer {
    guard let id = number(parameter("id"), default: 0), parameter("after") != .malformed else {
      return Answer(400, "the id is not a number, or after is malformed\n")
    }
    guard let lease = table.leases[id] else { return Answer(404, "there is no such lease\n") }
    var keys = lease.keys.sorted()
    if let text = parameter("after").text {
      let position = MetadataKey(text)
      keys.removeAll { !(position < $0) }
    }
    var writer = JSONWriter()
    writer.beginObject()
    writer.name("names")
    writer.beginArray()
    var byteCount = 0
    var count = 0
    for key in keys where byteCount < Self.pageBytes {
      writer.value(key.text)
      byteCount += key.text.utf8.count
      count += 1
    }
    writer.endArray()
    writer.member("more", count < keys.count ? 1 : 0)
    writer.endObject()
    return Answer(200, writer.text, isJSON: true)
  }

  private mutating func deleteLease(_ parameter: (String) -> Parameter) -> Answer {
    guard let id = number(parameter("id"), default: 0) else {
      return Answer(400, "the id is not a number\n")
    }
    if !table.revoke(id) { return Answer(404, "there is no such lease\n") }
    records.append(.revoke(lease: id))
    return Answer(200, "lease revoked\n")
  }

  /// Ends the leases that have expired.
  mutating func expire(now: UInt64) {
    let ids = table.expired(now: now)
    if ids.isEmpty { return }
    table.revoke(ids)
    records += ids.map { .revoke(lease: $0) }
  }

  private func health() -> Answer {
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("status", "ok")
    writer.member("keys", UInt64(table.count))
    writer.member("leases", UInt64(table.leases.count))
    writer.member("bytes", UInt64(table.usedBytes))
    writer.member("revision", table.revision)
    writer.endObject()
    return Answer(200, writer.text, isJSON: true)
  }

  // MARK: Journal

  /// Applies a record of the journal; returns what is wrong with it if it makes no sense.
  mutating func replay(_ record: MetadataJournal.Record) -> String? {
    switch record {
    case .put(let key, let value, let lease):
      if table.restore(MetadataKey(key), value, lease: lease) { return nil }
      return "a key belongs to the lease \(lease), which no earlier record has granted"
    case .delete(let key):
      _ = table.delete(MetadataKey(key))
      return nil
    case .grant(let lease, let ttl):
      let ttl = min(ttl, Self.leaseMilliseconds.upperBound)
      if table.restoreLease(lease, ttlMilliseconds: ttl, now: 0) { return nil }
      return "the lease \(lease) is granted a second time"
    case .revoke(let lease):
      _ = table.revoke(lease)
      return nil
    case .mark: return nil
    }
  }

  /// Starts the leases' time: every owner gets the full time to find the server again.
  mutating func startLeases(now: UInt64) { table.renewAll(now: now) }

  /// Records that reproduce the current state.
  var snapshot: [MetadataJournal.Record] {
    table.leases.map { .grant(lease: $0.key, ttlMilliseconds: $0.value.ttlMilliseconds) }
      + table.allEntries.map {
        .put(key: $0.key.text, value: $0.entry.value, lease: $0.entry.lease)
      }
  }
}
