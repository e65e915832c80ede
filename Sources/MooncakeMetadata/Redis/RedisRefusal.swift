import MooncakeBase

/// What Redis's errors mean for its use as a metadata service.
package enum RedisRefusal {
  /// The commands a user needs on the keys below mooncake/.
  package static let commands = "+get +set +del +mget +scan +eval +pexpire"
  /// Refusals of a password, of AUTH with a user before Redis 6, and of a missing database.
  private static let loginRefusals = [
    "invalid password", "'auth'", "no password is set", "DB index", "'select'", "unknown command",
  ]
  private static let noCluster =
    "cluster mode is not supported because keys would be on several nodes: name a Redis with "
    + "cluster-enabled no, which may have replicas, or use etcd or mooncake metadata serve"

  /// Throws if the server cannot keep metadata; `reply` is its answer to HELLO.
  package static func check(
    hello reply: RedisReply, hiding secrets: ServiceSecrets = ServiceSecrets()
  ) throws(RedisFailure) {
    if case .refusal(let text) = reply {
      // Redis before 6 does not know HELLO; if a login is missing or wrong, the next command says
      // so.
      if text.utf8.holds("unknown command") || text.hasPrefix("NOAUTH") { return }
      throw failure(text, isLogin: true, hiding: secrets)
    }
    guard case .list(let parts) = reply else { return }
    for (name, value) in zip(parts, parts.dropFirst()) {
      guard case .text(let name) = name, name.elementsEqual("mode".utf8),
        case .text(let mode) = value
      else { continue }
      if mode.elementsEqual("cluster".utf8) {
        throw RedisFailure(
          code: .unsupported, cause: "this Redis runs in cluster mode", remedy: noCluster)
      }
      if mode.elementsEqual("sentinel".utf8) {
        throw RedisFailure(
          code: .unsupported, cause: "this is a sentinel, which keeps no keys",
          remedy: "name the master, or an address that follows it")
      }
      return
    }
  }

  /// The failure for an error's text.
  package static func failure(
    _ text: String, isLogin: Bool, hiding secrets: ServiceSecrets = ServiceSecrets()
  ) -> RedisFailure {
    let cause = "the service answers '\(secrets.hidden(in: text.utf8).prefix(200))'"
    // Errors inside a script arrive wrapped, differently in each version.
    func says(_ words: String...) -> Bool {
      words.contains { text.hasPrefix($0) || text.utf8.holds("-\($0) ") }
    }
    func failure(_ code: MooncakeError.Code, _ remedy: String) -> RedisFailure {
      RedisFailure(code: code, cause: cause, remedy: remedy)
    }
    if says("READONLY", "MASTERDOWN") {
      return failure(
        .unreachable, "this server is not the master now; its name is resolved again")
    }
    if says("LOADING") {
      return failure(.unreachable, "this server is still loading its data; it is retried")
    }
    if says("NOREPLICAS") {
      return failure(
        .unreachable,
        "fewer replicas are up to date than its min-replicas-to-write; it is retried")
    }
    if text.utf8.holds("max number of clients") {
      return failure(.unreachable, "it is retried; raise its maxclients if this persists")
    }
    if says("DENIED") {
      return failure(
        .accessDenied,
        "Redis without a password accepts only local clients: give it one (requirepass), or set "
          + "protected-mode no")
    }
    if says("MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN")
      || text.utf8.holds("not allowed in cluster mode")
    {
      return failure(says("CLUSTERDOWN") ? .unreachable : .unsupported, noCluster)
    }
    if says("BUSY", "TRYAGAIN") { return failure(.unreachable, "try again later") }
    if says("NOPERM") || text.utf8.holds("ACL failure")
      || text.utf8.holds("user executing the script")
    {
      return failure(
        .accessDenied,
        "give the user the rights ~mooncake/* \(commands), and +select for a database")
    }
    if says("OOM", "MISCONF") || text.utf8.holds("maximum allowed size")
      || text.utf8.holds("invalid bulk length")
    {
      return failure(
        .full,
        "the service accepts no writes, or none of this size: see its log, maxmemory and "
          + "proto-max-bulk-len")
    }
    if says("NOAUTH", "WRONGPASS") || text.utf8.holds("AUTH")
      || isLogin && loginRefusals.contains(where: { text.utf8.holds($0) })
    {
      return failure(
        .accessDenied,
        "give the right user, password and database in the URI or in MC_REDIS_USERNAME, "
          + "MC_REDIS_PASSWORD and MC_REDIS_DB_INDEX")
    }
    if isLogin { return failure(.unreachable, "it is retried; see the service's log") }
    return failure(.protocolViolation, "is this Redis 5 or newer?")
  }
}
