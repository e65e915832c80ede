import MooncakeBase

/// Tells failures that pass by themselves from those that last until somebody mends them. Only what
/// is known to last may fail a registration; everything else is tried again.
package enum HTTPRefusal {
  /// Whether a service with this status is overloaded, starting, or late.
  package static func isPassing(_ status: Int) -> Bool {
    [408, 425, 429].contains(status) || (500...599).contains(status)
  }

  /// What the TLS libraries say when a side will not have the other one's certificate, or speaks
  /// no TLS or no common version of it.
  private static let lasting = [
    "certificate", "unknown ca", "access denied", "decrypt error", "handshake failure",
    "fatal alert", "protocol version", "wrong version", "unsupported protocol", "cipher",
    "http request", "packet length too long", "unexpected tls packet",
  ]

  /// Whether a failed handshake was refused; else its connection broke on the way.
  package static func isLasting(handshake text: String) -> Bool {
    let text = text.lowercased()
    return lasting.contains { text.utf8.holds($0) }
  }
}
