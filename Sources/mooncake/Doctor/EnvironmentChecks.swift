import Glibc
import MooncakeEngine
import MooncakeMetadata

/// Checks Mooncake's environment variables, those that this library reads and some that it does
/// not.
enum EnvironmentChecks {
  private enum Rule {
    case integer(ClosedRange<Int>)
    /// Outside the range from which the system chooses ports.
    case port
    case text
    case uri
    case oneOf([String])
    /// On if set, whatever the value.
    case flag
    /// Used by Mooncake, without effect here.
    case unused(String)
  }

  private static let rules: [String: Rule] = [
    "MC_LOG_LEVEL": .oneOf(["TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "OFF"]),
    "MC_HANDSHAKE_PORT": .integer(1...65_535),
    "MC_HANDSHAKE_MAX_LENGTH": .integer((1 << 20)...(128 << 20)),
    "MC_HANDSHAKE_CONNECT_TIMEOUT": .integer(1...3599),
    "MC_HANDSHAKE_LISTEN_BACKLOG": .integer(1...65_535),
    "MC_MIN_RPC_PORT": .port,
    "MC_MAX_RPC_PORT": .port,
    "MC_MIN_PRC_PORT": .port,
    "MC_MAX_PRC_PORT": .port,
    "MC_USE_IPV6": .flag,
    "MC_LEGACY_RPC_PORT_BINDING": .flag,
    "MC_TCP_BIND_ADDRESS": .text,
    "MC_TCP_PROTO": .integer(1...2),
    "MC_TRANSFER_TIMEOUT": .integer(1...Int.max),
    "MC_FORCE_TCP": .flag,
    "MC_METADATA_SERVER": .uri,
    "MC_METADATA_CLUSTER_ID": .text,
    "MC_METADATA_TTL": .integer(2...3600),
    "MC_METADATA_USERNAME": .text,
    "MC_METADATA_PASSWORD": .text,
    "MC_METADATA_HTTP_TOKEN": .text,
    "MC_METADATA_CA_FILE": .text,
    "MC_METADATA_CERT_FILE": .text,
    "MC_METADATA_KEY_FILE": .text,
    "MC_REDIS_USERNAME": .text,
    "MC_REDIS_PASSWORD": .text,
    "MC_REDIS_DB_INDEX": .integer(0...255),
    "MC_TCP_SLICE_SIZE": .unused("the engine chooses its own chunks"),
    "MC_TCP_ENABLE_CONNECTION_POOL": .unused("connections are always kept"),
    "MC_TCP_LANES_PER_PEER": .unused("the engine's options say how many connections a peer gets"),
    "MC_LOG_DIR": .unused("lines go to stderr or to the program's callback"),
  ]

  static func run() -> [Finding] {
    let findings = variables().map { check(name: $0.name, value: $0.value) }
    let range = rangeOrder()
    if findings.isEmpty { return [.ok("MC_*", "none set")] }
    return findings + range
  }

  /// Every MC_ variable that is set, sorted by name.
  private static func variables() -> [(name: String, value: String)] {
    var result: [(name: String, value: String)] = []
    var next = environ
    while let entry = next.pointee {
      next += 1
      let text = String(cString: entry)
      guard text.hasPrefix("MC_"), let equals = text.firstIndex(of: "=") else { continue }
      result.append(
        (String(text[..<equals]), String(text[text.index(after: equals)...])))
    }
    return result.sorted { $0.name < $1.name }
  }

  private static func check(name: String, value: String) -> Finding {
    let isSecret = ["PASSWORD", "TOKEN", "SECRET"].contains(where: name.hasSuffix)
    let shown = isSecret ? "(hidden)" : "\"\(value)\""
    guard let rule = rules[name] else {
      // Do not show the value: it may be a secret under a misspelled name.
      return .warning(
        name, "it has no effect in this version",
        advice: "check the spelling; the documentation lists what is read")
    }
    switch rule {
    case .flag: return .ok(name, "on (set at all means on, whatever the value)")
    case .unused(let reason):
      return .warning(name, "\(shown) has no effect: \(reason)", advice: "unset \(name)")
    case .text:
      return value.isEmpty
        ? invalid(name, shown, "must not be empty") : .ok(name, shown)
    case .uri: return .ok(name, RedactedURI.text(value))
    case .oneOf(let choices):
      return choices.contains(value.uppercased())
        ? .ok(name, shown)
        : invalid(name, shown, "must be one of " + choices.joined(separator: ", "))
    case .integer(let range):
      if Int(value).map(range.contains) == true { return .ok(name, shown) }
      let end = range.upperBound == Int.max ? "up" : "to \(range.upperBound)"
      return invalid(name, shown, "must be a number from \(range.lowerBound) \(end)")
    case .port:
      let port = Int(value) ?? 0
      return (1024...65_535).contains(port) && !(32_768...60_999).contains(port)
        ? .ok(name, shown)
        : invalid(name, shown, "must be a port from 1024 to 32767 or from 61000 to 65535")
    }
  }

  private static func invalid(_ name: String, _ shown: String, _ rule: String) -> Finding {
    .problem(
      name, "\(shown) is not valid and is ignored", advice: "\(name) \(rule); correct or unset it")
  }

  private static func rangeOrder() -> [Finding] {
    func number(_ names: String...) -> Int? {
      names.lazy.compactMap { getenv($0) }.first.flatMap { Int(String(cString: $0)) }
    }
    let lower = number("MC_MIN_RPC_PORT", "MC_MIN_PRC_PORT") ?? 15_000
    let upper = number("MC_MAX_RPC_PORT", "MC_MAX_PRC_PORT") ?? 17_000
    if lower <= upper { return [] }
    return [
      .problem(
        "MC_MIN_RPC_PORT and MC_MAX_RPC_PORT",
        "\(lower) is above \(upper), so both are ignored",
        advice: "set both, the smaller one as MC_MIN_RPC_PORT")
    ]
  }
}
