import MooncakeBase
import MooncakeMetadata
import Testing

struct RedisRefusalTests {
  @Test(
    arguments: [
      ("READONLY You can't write against a read only replica.", .unreachable, "master"),
      (
        "ERR Error running script (call to f_1): @user_script:1: -READONLY You can't write against "
          + "a read only replica.", .unreachable, "master"
      ),
      ("LOADING Redis is loading the dataset in memory", .unreachable, "still loading"),
      ("MASTERDOWN Link with MASTER is down", .unreachable, "master"),
      ("NOREPLICAS Not enough good replicas to write.", .unreachable, "min-replicas-to-write"),
      ("ERR max number of clients reached", .unreachable, "maxclients"),
      ("DENIED Redis is running in protected mode", .accessDenied, "protected-mode no"),
      ("CLUSTERDOWN Hash slot not served", .unreachable, "cluster mode"),
      ("MOVED 866 127.0.0.1:7001", .unsupported, "cluster mode"),
      ("CROSSSLOT Keys in request don't hash to the same slot", .unsupported, "cluster mode"),
      ("ERR SELECT is not allowed in cluster mode", .unsupported, "cluster mode"),
      ("MISCONF Redis is configured to save RDB snapshots", .full, "log"),
      ("OOM command not allowed when used memory > 'maxmemory'.", .full, "maxmemory"),
      ("NOPERM this user has no permissions to run the 'eval' command", .accessDenied, "+eval"),
      (
        "ERR ACL failure in script: User m has no permissions to run the 'pexpire' command",
        .accessDenied, "+pexpire"
      ),
      (
        "ERR The user executing the script can't run this command or subcommand script: 5",
        .accessDenied, "+pexpire"
      ),
      ("WRONGPASS invalid username-password pair", .accessDenied, "MC_REDIS_PASSWORD"),
      ("NOAUTH Authentication required.", .accessDenied, "MC_REDIS_PASSWORD"),
      ("ERR unknown command 'EVAL'", .protocolViolation, "Redis 5"),
    ] as [(String, MooncakeError.Code, String)])
  func meaning(text: String, code: MooncakeError.Code, word: String) {
    let failure = RedisRefusal.failure(text, isLogin: false)
    #expect(failure.code == code)
    #expect("\(failure.cause): \(failure.remedy)".contains(word))
  }

  @Test(
    arguments: [
      ("ERR max number of clients reached", .unreachable),
      ("LOADING Redis is loading the dataset in memory", .unreachable),
      ("ERR upstream failure", .unreachable),
      ("WRONGPASS invalid username-password pair", .accessDenied),
      ("ERR invalid password", .accessDenied),
      ("ERR wrong number of arguments for 'auth' command", .accessDenied),
      ("ERR Client sent AUTH, but no password is set", .accessDenied),
      ("ERR DB index is out of range", .accessDenied),
      ("ERR invalid DB index", .accessDenied),
    ] as [(String, MooncakeError.Code)])
  func login(text: String, code: MooncakeError.Code) {
    #expect(RedisRefusal.failure(text, isLogin: true).code == code)
  }

  /// The meaning of an answer does not depend on the password; only what is shown of it does.
  @Test(arguments: ["command", "un", "A", "N", "longer password"])
  func secrets(password: String) throws {
    let secrets = ServiceSecrets(password)
    try RedisRefusal.check(hello: .refusal("ERR unknown command 'HELLO'"), hiding: secrets)
    try RedisRefusal.check(hello: .refusal("NOAUTH HELLO must be called"), hiding: secrets)
    let failure = RedisRefusal.failure(
      "NOAUTH unknown '\(password)'", isLogin: false, hiding: secrets)
    #expect(failure.code == .accessDenied)
    let isQuoted = password.utf8.count >= 6
    #expect(failure.cause == "the service answers '\(isQuoted ? "NOAUTH unknown '***'" : "***")'")
  }

  @Test func hello() throws {
    try RedisRefusal.check(hello: .refusal("NOAUTH HELLO must be called with the client already"))
    for (text, code) in [
      ("DENIED Redis is running in protected mode", .accessDenied),
      ("ERR max number of clients reached", .unreachable),
      ("ERR odd", .unreachable),
    ] as [(String, MooncakeError.Code)] {
      let failure = #expect(throws: RedisFailure.self) {
        try RedisRefusal.check(hello: .refusal(text))
      }
      #expect(failure?.code == code)
    }
  }

  @Test func modes() throws {
    func reply(_ mode: String) -> RedisReply {
      .list(["server", "redis", "mode", mode, "role", "master"].map { .text(Array($0.utf8)) })
    }
    try RedisRefusal.check(hello: reply("standalone"))
    try RedisRefusal.check(hello: .refusal("ERR unknown command `HELLO`"))
    #expect(throws: RedisFailure.self) { try RedisRefusal.check(hello: reply("cluster")) }
    #expect(throws: RedisFailure.self) { try RedisRefusal.check(hello: reply("sentinel")) }
  }
}
