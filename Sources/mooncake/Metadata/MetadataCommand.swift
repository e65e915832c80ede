import ArgumentParser
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

/// Groups the commands for metadata services.
struct MetadataCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "metadata",
    abstract: "Serves metadata over HTTP, and inspects any metadata service.",
    discussion: """
      Give the same service as to engines: etcd://host:2379, redis://host:6379 or \
      http://host:8080/metadata. Keys begin with mooncake/. Exit codes: 0 done, 1 failed, 64 wrong \
      usage.
      """,
    subcommands: [
      MetadataServeCommand.self, MetadataGetCommand.self, MetadataPutCommand.self,
      MetadataDeleteCommand.self, MetadataListCommand.self, MetadataWatchCommand.self,
    ])
}

/// Runs the HTTP metadata server.
struct MetadataServeCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "serve",
    abstract: "Serves metadata over HTTP until it is stopped.",
    discussion: """
      The first line on stdout is the URI to give to engines. Anybody who reaches the port may \
      read and change everything, so it listens on the loopback unless --host says otherwise. If \
      MC_METADATA_HTTP_TOKEN is set, or --token-file is given, only clients with the same token in \
      MC_METADATA_HTTP_TOKEN may. Ends on SIGINT or SIGTERM.
      """)

  @Option(help: "Numeric address to listen on; 0.0.0.0 or :: for every interface.")
  var host = "127.0.0.1"

  @Option(help: "Port; 0: the system chooses.")
  var port: UInt16 = 8080

  @Option(help: "Folder that keeps the contents across restarts; default: memory only.")
  var directory: String?

  @Option(help: "Limit on keys and values in total, such as 256MiB.")
  var memory = ByteCount(1 << 30)

  @Option(help: "File with the token that clients must send; default: MC_METADATA_HTTP_TOKEN.")
  var tokenFile: String?

  @Flag(help: "Prints one JSON object instead of the URI.")
  var json = false

  func run() throws {
    let stop = try StopRequest()
    raiseDescriptorLimit()
    try reportingErrors {
      var options = MetadataServer.Options()
      options.host = host
      options.port = port
      options.directory = directory
      options.maximumBytes = Int(clamping: memory.value)
      options.token = try token()
      let server = try MetadataServer(options)
      if json {
        var line = JSONObject()
        line.add("uri", server.uri)
        line.add("port", Int(server.address.port ?? 0))
        printLine(line.text)
      } else {
        printLine(server.uri)
      }
      try Output.check()
      stop.wait(until: .never, orEndOfInput: false)
      server.stop()
    }
  }

  /// The file's text without its line end.
  private func token() throws(MooncakeError) -> String? {
    guard let tokenFile else { return nil }
    guard let text = SystemFiles.text(tokenFile) else {
      throw MooncakeError(
        .system,
        "reading the token file \(tokenFile): \(Errno.current): does it exist, and may this user "
          + "read it?")
    }
    return text
  }

  /// Every connection takes a descriptor, and the usual limit is below the server's limit of
  /// connections.
  private func raiseDescriptorLimit() {
    var limit = rlimit()
    guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return }
    limit.rlim_cur = min(limit.rlim_max, max(limit.rlim_cur, 4096))
    _ = setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
  }
}
