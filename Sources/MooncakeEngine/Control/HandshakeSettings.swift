import MooncakeSystem

/// RPC settings from environment variables. A value out of its range counts as absent.
package struct HandshakeSettings: Sendable {
  /// `MC_HANDSHAKE_PORT`: the port for names without one.
  package var defaultPort: UInt16 = 12_001
  /// `MC_HANDSHAKE_MAX_LENGTH`: most bytes of a message, including the type byte.
  package var maximumLength = 1 << 20
  /// `MC_HANDSHAKE_CONNECT_TIMEOUT` (seconds): for each address of a peer.
  package var connectTimeoutMilliseconds: UInt64 = 5000
  /// `MC_HANDSHAKE_LISTEN_BACKLOG`.
  package var backlog: Int32 = 128
  /// `MC_MIN_RPC_PORT` to `MC_MAX_RPC_PORT`: the range from which the drop-in API takes ports.
  package var portRange: ClosedRange<UInt16> = 15_000...17_000
  /// `MC_USE_IPV6`: whether it is set, whatever the value.
  package var usesIPv6 = false
  /// `MC_TCP_BIND_ADDRESS`: the advertised host if a metadata service is used.
  package var advertisedAddress: String?
  /// `MC_LEGACY_RPC_PORT_BINDING`: whether it is set, whatever the value.
  package var isLegacyPortBinding = false

  package init() {}

  /// Reads the process's environment.
  package static func fromEnvironment() -> HandshakeSettings {
    HandshakeSettings { Environment[$0] }
  }

  /// Reads variables by name.
  package init(variable: (String) -> String?) {
    func number(_ name: String, in range: ClosedRange<Int>) -> Int? {
      variable(name).flatMap { Int($0) }.flatMap { range.contains($0) ? $0 : nil }
    }
    if let value = number("MC_HANDSHAKE_PORT", in: 1...65_535) { defaultPort = UInt16(value) }
    if let value = number("MC_HANDSHAKE_MAX_LENGTH", in: (1 << 20)...(128 << 20)) {
      maximumLength = value
    }
    if let value = number("MC_HANDSHAKE_CONNECT_TIMEOUT", in: 1...3599) {
      connectTimeoutMilliseconds = UInt64(value) * 1000
    }
    if let value = number("MC_HANDSHAKE_LISTEN_BACKLOG", in: 1...65_535) { backlog = Int32(value) }
    usesIPv6 = variable("MC_USE_IPV6") != nil
    isLegacyPortBinding = variable("MC_LEGACY_RPC_PORT_BINDING") != nil
    advertisedAddress = variable("MC_TCP_BIND_ADDRESS").flatMap { $0.isEmpty ? nil : $0 }

    // The misspelled name is as old as the right one.
    func port(_ name: String, _ other: String, _ standard: UInt16) -> UInt16? {
      guard let text = variable(name) ?? variable(other) else { return standard }
      guard let value = UInt16(text), value >= 1024, !(32_768...60_999).contains(value) else {
        return nil
      }
      return value
    }
    let lower = port("MC_MIN_RPC_PORT", "MC_MIN_PRC_PORT", portRange.lowerBound)
    let upper = port("MC_MAX_RPC_PORT", "MC_MAX_PRC_PORT", portRange.upperBound)
    if let lower, let upper, lower <= upper { portRange = lower...upper }
  }
}
