import MooncakeBase
import MooncakeSystem
import Synchronization

/// Metadata in Redis. Each key has its own expiry instead of a lease, and changes are found by
/// listing, since Redis reports them only if configured to.
package final class RedisService: MetadataService {
  package let uri: MetadataURI
  /// Redis does not count changes.
  package let listingScansAllKeys = true
  package let comparesRevisions = false
  private let library: HiredisLibrary
  private let idle = Lock<[RedisConnection]>([])
  private let user: String?
  private let password: String?
  private let database: UInt8
  private static let idleLimit = 4
  private static let scanCount = 1000
  private static let listPauseMilliseconds: UInt64 = 500

  /// Renews a key's expiry if it still has the value that this process put: another's may be meant
  /// to stay.
  private static let renewOwn =
    "if redis.call('get',KEYS[1])==ARGV[1] then return redis.call('pexpire',KEYS[1],ARGV[2]) "
    + "else return 0 end"

  /// Removes a key if it still has the value that this process put.
  private static let deleteOwn =
    "if redis.call('get',KEYS[1])==ARGV[1] then return redis.call('del',KEYS[1]) else return 0 end"

  package init(_ uri: MetadataURI, _ settings: MetadataSettings) throws(MooncakeError) {
    self.uri = uri
    library = try HiredisLibrary.shared()
    user = uri.user ?? settings.redisUser
    password = uri.password ?? settings.redisPassword
    database = uri.database ?? settings.redisDatabase
  }

  package func get(_ key: String, _ call: Call) throws(MooncakeError) -> String? {
    let phase = "get '\(key)'"
    switch try ask(["GET", key], phase, call) {
    case .none: return nil
    case .text(let bytes):
      guard let text = String(validating: bytes, as: UTF8.self) else {
        throw failure(
          .protocolViolation, phase, "the value is not UTF-8", "remove the key, or correct it")
      }
      return text
    case let other: throw unexpected(other, phase)
    }
  }

  package func put(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) {
    _ = try ask(Self.set(entry, lease), "put '\(entry.key)'", call)
  }

  package func putIfAbsent(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) -> Bool {
    let phase = "put '\(entry.key)' if absent"
    var isRepeated = false
    let replies = try ask([Self.set(entry, lease) + ["NX"]], phase, call, isRepeated: &isRepeated)
    guard case .none = replies[0] else { return true }
    // An earlier attempt that seemed to fail may have put it.
    return isRepeated ? try get(entry.key, call) == entry.value : false
  }

  package func delete(_ key: String, _ call: Call) throws(MooncakeError) -> Bool {
    var isRepeated = false
    let replies = try ask([["DEL", key]], "delete '\(key)'", call, isRepeated: &isRepeated)
    if case .number(let count) = replies[0], count > 0 { return true }
    // An earlier attempt that seemed to fail may have deleted it.
    return isRepeated
  }

  package func values(
    of keys: [String], _ call: Call
  ) throws(MooncakeError) -> [String?] {
    var values: [String?] = []
    while values.count < keys.count {
      let part = keys[values.count...].prefix(Self.scanCount)
      guard case .list(let found) = try ask(["MGET"] + part, "get keys", call),
        found.count == part.count
      else { throw unexpected(.none, "get keys") }
      values += found.map {
        if case .text(let bytes) = $0 { String(decoding: bytes, as: UTF8.self) } else { nil }
      }
    }
    return values
  }

  package func list(
    prefix: String, from position: String?, limit: Int, _ call: Call
  ) throws(MooncakeError) -> MetadataPage {
    let phase = "list '\(prefix)'"
    var keys: Set<MetadataKey> = []
    var cursor = "0"
    repeat {
      let command = [
        "SCAN", cursor, "MATCH", Self.pattern(prefix), "COUNT", String(Self.scanCount),
      ]
      guard case .list(let parts) = try ask(command, phase, call), parts.count == 2,
        case .text(let next) = parts[0], case .list(let found) = parts[1]
      else { throw unexpected(.none, phase) }
      cursor = String(decoding: next, as: UTF8.self)
      for case .text(let key) in found {
        // A key that is not UTF-8 is not ours.
        guard let key = String(validating: key, as: UTF8.self) else { continue }
        if let position, !position.utf8.lexicographicallyPrecedes(key.utf8) { continue }
        keys.insert(MetadataKey(key))
      }
    } while cursor != "0"
    var entries: [MetadataEntry] = []
    // Redis keeps no order, so every page scans all keys but fetches only its own values.
    let sorted = keys.sorted().prefix(max(1, limit)).map(\.text)
    for start in stride(from: 0, to: sorted.count, by: Self.scanCount) {
      let part = sorted[start..<min(start + Self.scanCount, sorted.count)]
      guard case .list(let values) = try ask(["MGET"] + part, phase, call) else {
        throw unexpected(.none, phase)
      }
      for (key, value) in zip(part, values) {
        // Values of other types and keys that have vanished have no text.
        guard case .text(let bytes) = value else { continue }
        entries.append(MetadataEntry(key: key, value: String(decoding: bytes, as: UTF8.self)))
      }
    }
    let isCut = sorted.count < keys.count
    return MetadataPage(entries: entries, revision: 0, next: isCut ? sorted.last : nil)
  }

  package func changes(
    prefix: String, since revision: UInt64, _ call: Call
  ) throws(MooncakeError) -> MetadataChanges {
    if call.sleep(milliseconds: Self.listPauseMilliseconds) {
      throw failure(.canceled, "watch '\(prefix)'", "given up", "call again if it is still wanted")
    }
    return call.deadline.hasPassed ? .changes([], revision: 0) : .unknown
  }

  // MARK: Leases

  package func grant(
    ttlMilliseconds: UInt64, _ call: Call
  ) throws(MooncakeError) -> MetadataLease? {
    MetadataLease(id: 0, ttlMilliseconds: ttlMilliseconds)
  }

  /// There are no strays: a key that is not among the entries is not renewed and expires.
  package func renew(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], strays: inout [String],
    _ call: Call
  ) throws(MooncakeError) -> MetadataRenewal {
    guard let lease else { return .kept }
    let phase = "renew keys"
    var lost: [String] = []
    for start in stride(from: 0, to: entries.count, by: Self.scanCount) {
      let part = entries[start..<min(start + Self.scanCount, entries.count)]
      let commands = part.map {
        ["EVAL", Self.renewOwn, "1", $0.key, $0.value, String(lease.ttlMilliseconds)]
      }
      for (entry, reply) in zip(part, try ask(commands, phase, call)) {
        if case .number(1) = reply { continue }
        lost.append(entry.key)
      }
    }
    return lost.isEmpty ? .kept : .lost(lost)
  }

  package func revoke(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], _ call: Call
  ) throws(MooncakeError) {
    let commands = entries.map { ["EVAL", Self.deleteOwn, "1", $0.key, $0.value] }
    _ = try ask(commands, "remove keys", call)
  }

  // MARK: Commands

  private static func set(_ entry: MetadataEntry, _ lease: MetadataLease?) -> [String] {
    ["SET", entry.key, entry.value] + (lease.map { ["PX", String($0.ttlMilliseconds)] } ?? [])
  }

  /// A prefix as a pattern, with special characters escaped.
  private static func pattern(_ prefix: String) -> String {
    var pattern = ""
    for scalar in prefix.unicodeScalars {
      if "*?[]\\^".unicodeScalars.contains(scalar) { pattern += "\\" }
      pattern.unicodeScalars.append(scalar)
    }
    return pattern + "*"
  }

  private func ask(
    _ command: [String], _ phase: String, _ call: Call
  ) throws(MooncakeError) -> RedisReply {
    try ask([command], phase, call)[0]
  }

  private func ask(
    _ commands: [[String]], _ phase: String, _ call: Call
  ) throws(MooncakeError) -> [RedisReply] {
    var isRepeated = false
    return try ask(commands, phase, call, isRepeated: &isRepeated)
  }

  /// `isRepeated` is set if an attempt failed that may still have taken effect.
  private func ask(
    _ commands: [[String]], _ phase: String, _ call: Call, isRepeated: inout Bool
  ) throws(MooncakeError) -> [RedisReply] {
    if commands.isEmpty { return [] }
    do throws(RedisFailure) {
      if let connection = takeIdle() {
        do throws(RedisFailure) {
          return try run(commands, connection, phase, call)
        } catch {
          // The idle connection may have been closed, or lead to a former master: try a new one.
          if error.code != .unreachable { throw error }
          isRepeated = true
        }
      }
      return try run(commands, try connect(call), phase, call)
    } catch {
      throw failure(error.code, phase, error.cause, error.remedy)
    }
  }

  private func run(
    _ commands: [[String]], _ connection: RedisConnection, _ phase: String, _ call: Call
  ) throws(RedisFailure) -> [RedisReply] {
    let replies = try connection.run(commands, call)
    do throws(RedisFailure) {
      try check(replies, phase)
    } catch {
      // Other connections may lead to the same server, so drop them.
      if error.code == .unreachable { idle.withLock { $0 = [] } } else { keep(connection) }
      throw error
    }
    keep(connection)
    return replies
  }

  /// An idle connection that still looks open.
  private func takeIdle() -> RedisConnection? {
    while let connection = idle.withLock({ $0.popLast() }) {
      if !connection.isStale { return connection }
    }
    return nil
  }

  private func keep(_ connection: RedisConnection) {
    idle.withLock { if $0.count < Self.idleLimit { $0.append(connection) } }
  }

  private func connect(_ call: Call) throws(RedisFailure) -> RedisConnection {
    let connection = try RedisConnection(library, to: uri.endpoints[0], call)
    var commands: [[String]] = []
    if let password { commands.append(["AUTH"] + (user.map { [$0] } ?? []) + [password]) }
    if database != 0 { commands.append(["SELECT", String(database)]) }
    // Ask first what kind of Redis this is; the user needs no rights for that. Redis before 6 does
    // not know the command.
    commands.insert(["HELLO", "2"], at: password == nil ? 0 : 1)
    var replies = try connection.run(commands, call)
    let hello = replies.remove(at: password == nil ? 0 : 1)
    try RedisRefusal.check(hello: hello, hiding: ServiceSecrets(password))
    try check(replies, "authenticate")
    return connection
  }

  private func check(_ replies: [RedisReply], _ phase: String) throws(RedisFailure) {
    for case .refusal(let answer) in replies {
      throw RedisRefusal.failure(
        answer, isLogin: phase == "authenticate", hiding: ServiceSecrets(password))
    }
  }

  private func unexpected(_ reply: RedisReply, _ phase: String) -> MooncakeError {
    failure(
      .protocolViolation, phase, "the answer has an unexpected type", "is this Redis 5 or newer?")
  }
}
