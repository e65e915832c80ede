/// Pauses between attempts that fail: each twice as long as the one before, up to a limit.
package struct Backoff: Sendable {
  package static let firstMilliseconds: UInt64 = 100
  package static let maximumMilliseconds: UInt64 = 1000

  /// The pause after the last attempt; 0 if it succeeded.
  package private(set) var milliseconds: UInt64 = 0

  package init() {}

  package var isFailing: Bool { milliseconds > 0 }

  package mutating func failed() {
    milliseconds = min(
      Self.maximumMilliseconds, max(Self.firstMilliseconds, milliseconds * 2))
  }

  package mutating func succeeded() { milliseconds = 0 }
}
