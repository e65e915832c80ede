import MooncakeSystem

/// Why an operation failed: a code to act on and a sentence naming peer, phase, cause and remedy.
public struct MooncakeError: Error, Sendable, CustomStringConvertible {
  /// Raw values are the `MOONCAKE_ERROR_*` constants of the C header.
  public enum Code: Int32, Sendable, CaseIterable {
    case invalidArgument = -1
    case invalidHandle = -2
    case notRegistered = -3
    case overlap = -4
    case accessDenied = -5
    case busy = -6
    case full = -7
    case outOfMemory = -8
    case addressInUse = -9
    case unresolved = -10
    case unreachable = -11
    case protocolViolation = -12
    case notFound = -13
    case timeout = -14
    case canceled = -15
    case unsupported = -16
    case system = -17
    case exists = -18
    case notHeld = -19
    case sizeMismatch = -20
    case digestMismatch = -21
    case noHolder = -22
  }

  public let code: Code
  public let message: String
  /// Whether it has been logged already.
  package var isLogged = false

  /// In bytes; room for the longest names.
  private static let messageLimit = 8000

  public init(_ code: Code, _ message: String) {
    self.code = code
    // Parts may come from a peer or a service, so escape them.
    self.message = PrintableText.make(message, limit: Self.messageLimit)
  }

  public var description: String { message }

  /// Whether a retry would fail the same way until somebody intervenes. Other errors may pass by
  /// themselves.
  package var isRefusal: Bool {
    switch code {
    case .full, .accessDenied, .protocolViolation, .unsupported, .invalidArgument: true
    default: false
    }
  }
}
