import MooncakeBase

/// Distinguishes failures that pass by themselves from those that last until somebody fixes them.
/// Only a failure known to last may fail a registration; everything else is retried.
package enum HTTPRefusal {
  /// Whether this status means that the service is overloaded, starting, or slow.
  package static func isPassing(_ status: Int) -> Bool {
    [408, 425, 429].contains(status) || (500...599).contains(status)
  }

  /// Parts of TLS libraries' messages when one side refuses the other's certificate, does not speak
  /// TLS, or shares no version of it.
  private static let lasting = [
    "certificate", "unknown ca", "access denied", "decrypt error", "handshake failure",
    "fatal alert", "protocol version", "wrong version", "unsupported protocol", "cipher",
    "http request", "packet length too long", "unexpected tls packet",
  ]

  /// Whether a failed handshake was refused; otherwise the connection broke.
  package static func isLasting(handshake text: String) -> Bool {
    let text = text.lowercased()
    return lasting.contains { text.utf8.holds($0) }
  }
}
