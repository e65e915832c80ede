import ArgumentParser
import MooncakeSystem

/// The metadata service; shared by all commands that need one.
struct ServiceArguments: ParsableArguments {
  @Option(
    help: """
      Metadata service, such as etcd://host:2379, redis://host:6379 or \
      http://host:8080/metadata; default: MC_METADATA_SERVER.
      """)
  var metadata: String?

  func validate() throws {
    if uri.isEmpty {
      throw ValidationError(
        "Name the metadata service with --metadata URI or in MC_METADATA_SERVER; "
          + "`mooncake metadata serve` starts one.")
    }
  }

  var uri: String { metadata ?? Environment["MC_METADATA_SERVER"] ?? "" }
}

/// Refuses a --timeout out of a range.
func requireTimeout(_ span: TimeSpan?, atMost seconds: UInt64) throws {
  guard let span else { return }
  if span.nanoseconds < 1_000_000 || span.nanoseconds > seconds * 1_000_000_000 {
    throw ValidationError("--timeout must be between 1ms and \(seconds)s.")
  }
}
