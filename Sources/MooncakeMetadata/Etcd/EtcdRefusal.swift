import MooncakeBase

/// What etcd's errors mean for its use as a metadata service.
package enum EtcdRefusal {
  package struct Meaning: Sendable {
    package var code: MooncakeError.Code
    package var remedy: String
  }

  /// Whether the reason says that a token has expired or is older than the cluster's users.
  package static func isStaleToken(_ reason: String) -> Bool {
    [
      "invalid auth token", "auth store is old", "revision in header is old", "token is expired",
      "token has expired",
    ].contains { reason.utf8.holds($0) }
  }

  package static func meaning(_ status: Int, _ reason: String) -> Meaning {
    func says(_ words: String...) -> Bool { words.contains { reason.utf8.holds($0) } }
    if says("CommonName of client", "common name") {
      return Meaning(
        code: .accessDenied,
        remedy: "with users, etcd's JSON gateway refuses certificates with a common name: give a "
          + "client certificate without one (CN), and user and password")
    }
    if says("lease not found") {
      return Meaning(code: .notFound, remedy: "the lease has ended; a new one is requested")
    }
    if isStaleToken(reason) {
      // Even a new token is stale: the users are being changed, or not all members know it yet.
      return Meaning(
        code: .unreachable,
        remedy: "it is retried with a new token; if this persists, check the members' clocks and "
          + "that all have the same --auth-token")
    }
    if says(
      "authentication failed", "user name is empty", "permission denied", "user name not found",
      "role name not found") || [401, 403].contains(status)
    {
      return Meaning(
        code: .accessDenied,
        remedy: "give the right user and password, and grant that user access to the keys")
    }
    if says("request is too large", "message larger than max") {
      return Meaning(
        code: .full,
        remedy: "etcd takes 1.5 MiB in one request: register fewer and larger buffers, or raise "
          + "its --max-request-bytes")
    }
    if says("database space exceeded") {
      return Meaning(code: .full, remedy: "compact and defragment etcd, or raise its quota")
    }
    if says("too many requests") || [408, 425, 429].contains(status) {
      return Meaning(code: .unreachable, remedy: "the cluster is overloaded; it is retried")
    }
    if says("no leader", "timed out", "leader changed", "Unavailable", "connection refused")
      || status >= 500
    {
      return Meaning(code: .unreachable, remedy: "does the cluster have a majority?")
    }
    if status == 404 {
      return Meaning(
        code: .protocolViolation,
        remedy: "there is no JSON gateway: start etcd without --enable-grpc-gateway=false, and "
          + "update one before 3.4")
    }
    return Meaning(code: .protocolViolation, remedy: "is this etcd 3.4 or newer?")
  }
}
