import MooncakeEngine
import Testing

struct HandshakeSettingsTests {
  private func settings(_ variables: [String: String]) -> HandshakeSettings {
    HandshakeSettings { variables[$0] }
  }

  @Test func defaults() {
    let defaults = settings([:])
    #expect(defaults.defaultPort == 12001)
    #expect(defaults.maximumLength == 1 << 20)
    #expect(defaults.connectTimeoutMilliseconds == 5000)
    #expect(defaults.backlog == 128)
    #expect(defaults.portRange == 15000...17000)
    #expect(!defaults.usesIPv6 && !defaults.isLegacyPortBinding)
    #expect(defaults.advertisedAddress == nil)
  }

  @Test func valuesInRangeCount() {
    let given = settings([
      "MC_HANDSHAKE_PORT": "7", "MC_HANDSHAKE_MAX_LENGTH": "134217728",
      "MC_HANDSHAKE_CONNECT_TIMEOUT": "3599", "MC_HANDSHAKE_LISTEN_BACKLOG": "9",
      "MC_USE_IPV6": "", "MC_LEGACY_RPC_PORT_BINDING": "0", "MC_TCP_BIND_ADDRESS": "10.0.0.5",
    ])
    #expect(given.defaultPort == 7 && given.maximumLength == 128 << 20 && given.backlog == 9)
    #expect(given.connectTimeoutMilliseconds == 3_599_000)
    #expect(given.usesIPv6 && given.isLegacyPortBinding && given.advertisedAddress == "10.0.0.5")
  }

  @Test(arguments: ["", "x", "0", "-1", "65536", "1048575", "134217729", "99999999999999999999"])
  func valuesOutOfRangeDoNot(text: String) {
    let given = settings([
      "MC_HANDSHAKE_PORT": text == "1048575" ? "0" : text, "MC_HANDSHAKE_MAX_LENGTH": text,
    ])
    #expect(given.defaultPort == 12001 && given.maximumLength == 1 << 20)
  }

  @Test(
    arguments: [
      ("20000", "20010", 20000...20010), ("1024", "32767", 1024...32767),
      ("61000", "65535", 61000...65535), ("20000", "20000", 20000...20000),
      ("20001", "20000", 15000...17000), ("1023", "2000", 15000...17000),
      ("32768", "40000", 15000...17000), ("20000", "60999", 15000...17000),
      ("20000", "70000", 15000...17000), ("x", "20000", 15000...17000),
      (nil, "16000", 15000...16000), ("16000", nil, 16000...17000), (nil, "14000", 15000...17000),
    ] as [(String?, String?, ClosedRange<UInt16>)])
  func portRange(lower: String?, upper: String?, expected: ClosedRange<UInt16>) {
    for (first, second) in [
      ("MC_MIN_RPC_PORT", "MC_MAX_RPC_PORT"), ("MC_MIN_PRC_PORT", "MC_MAX_PRC_PORT"),
    ] {
      var variables: [String: String] = [:]
      variables[first] = lower
      variables[second] = upper
      #expect(settings(variables).portRange == expected)
    }
  }
}
