import MooncakeSystem

/// Files that secure the connection to a metadata service.
package struct TLSFiles: Equatable, Sendable {
  /// Certificates to verify the service's with; nil for the system's.
  package var authority: String?
  package var certificate: String?
  package var key: String?

  package init(authority: String? = nil, certificate: String? = nil, key: String? = nil) {
    self.authority = authority
    self.certificate = certificate
    self.key = key
  }
}

/// Settings for metadata services from environment variables. The URI takes precedence; a value out
/// of its range counts as absent.
package struct MetadataSettings: Sendable {
  /// `MC_METADATA_CLUSTER_ID`: separates clusters that share a service.
  package var clusterID = ""
  /// `MC_METADATA_TTL` (in seconds): how long the keys of a dead process stay.
  package var ttlMilliseconds: UInt64 = 10_000
  /// `MC_METADATA_USERNAME`, `MC_METADATA_PASSWORD`.
  package var user: String?
  package var password: String?
  /// `MC_METADATA_HTTP_TOKEN`: the token that HTTP servers, ours included, require.
  package var token: String?
  /// `MC_METADATA_CA_FILE`, `MC_METADATA_CERT_FILE`, `MC_METADATA_KEY_FILE`.
  package var tls = TLSFiles()
  /// `MC_REDIS_USERNAME`, `MC_REDIS_PASSWORD`, `MC_REDIS_DB_INDEX`.
  package var redisUser: String?
  package var redisPassword: String?
  package var redisDatabase: UInt8 = 0

  package init() {}

  /// Reads the process's environment.
  package static func fromEnvironment() -> MetadataSettings {
    MetadataSettings { Environment[$0] }
  }

  /// Reads variables by name.
  package init(variable: (String) -> String?) {
    func text(_ name: String) -> String? { variable(name).flatMap { $0.isEmpty ? nil : $0 } }
    clusterID = text("MC_METADATA_CLUSTER_ID") ?? ""
    if let seconds = variable("MC_METADATA_TTL").flatMap({ UInt64($0) }),
      (2...3600).contains(seconds)
    {
      ttlMilliseconds = seconds * 1000
    }
    user = text("MC_METADATA_USERNAME")
    password = text("MC_METADATA_PASSWORD")
    token = text(MetadataToken.variable)
    tls = TLSFiles(
      authority: text("MC_METADATA_CA_FILE"), certificate: text("MC_METADATA_CERT_FILE"),
      key: text("MC_METADATA_KEY_FILE"))
    redisUser = text("MC_REDIS_USERNAME")
    redisPassword = text("MC_REDIS_PASSWORD")
    redisDatabase = text("MC_REDIS_DB_INDEX").flatMap { UInt8($0) } ?? 0
  }
}
