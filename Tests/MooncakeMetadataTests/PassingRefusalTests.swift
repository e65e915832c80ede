import MooncakeBase
import MooncakeMetadata
import Testing

/// Overload and broken connections are temporary, so they must not fail a registration.
struct PassingRefusalTests {
  @Test(
    arguments: [
      (400, "etcdserver: too many requests", .unreachable),
      (429, "grpc: resource exhausted", .unreachable),
      (408, "", .unreachable),
      (425, "", .unreachable),
      (503, "etcdserver: no leader", .unreachable),
      // The second time within a call, after a new token was requested.
      (401, "etcdserver: invalid auth token", .unreachable),
      (400, "etcdserver: revision of auth store is old", .unreachable),
      (429, "etcdserver: mvcc: database space exceeded", .full),
      (429, "grpc: received message larger than max (3 vs. 2)", .full),
      (400, "etcdserver: request is too large", .full),
      (400, "etcdserver: authentication failed, invalid user ID or password", .accessDenied),
      (403, "etcdserver: permission denied", .accessDenied),
      (401, "CommonName of client sending a request against gateway", .accessDenied),
      (404, "Not Found", .protocolViolation),
    ] as [(Int, String, MooncakeError.Code)])
  func etcd(status: Int, reason: String, code: MooncakeError.Code) {
    #expect(EtcdRefusal.meaning(status, reason).code == code)
  }

  @Test func statuses() {
    for status in [408, 425, 429, 500, 502, 503, 504] { #expect(HTTPRefusal.isPassing(status)) }
    for status in [400, 401, 403, 404, 409, 410, 412, 413] {
      #expect(!HTTPRefusal.isPassing(status))
    }
  }

  @Test(
    arguments: [
      "OpenSSL SSL_connect: Connection reset by peer in connection to 10.0.0.1:2379",
      "OpenSSL SSL_connect: SSL_ERROR_SYSCALL in connection to 10.0.0.1:2379",
      "TLS connect error: error:0A000126:SSL routines::unexpected eof while reading",
      "gnutls_handshake() failed: The TLS connection was non-properly terminated.",
      "Recv failure: Connection reset by peer", "SSL connect error", "",
    ])
  func brokenHandshake(text: String) {
    #expect(!HTTPRefusal.isLasting(handshake: text))
  }

  @Test(
    arguments: [
      "error:0A000412:SSL routines::sslv3 alert bad certificate",
      "error:0A00045C:SSL routines::tlsv13 alert certificate required",
      "error:0A000418:SSL routines::tlsv1 alert unknown ca",
      "error:0A000410:SSL routines::sslv3 alert handshake failure",
      "error:0A00010B:SSL routines::wrong version number",
      "gnutls_handshake() failed: A TLS fatal alert has been received.",
    ])
  func refusedHandshake(text: String) {
    #expect(HTTPRefusal.isLasting(handshake: text))
  }
}
