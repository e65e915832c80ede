import ArgumentParser
import MooncakeEngine

/// Looks for problems with this machine, a peer or a metadata service.
struct DoctorCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "doctor",
    abstract: "Checks this machine and, if named, a peer and a metadata service.",
    discussion: """
      Says what to do about each finding. Exit code 1 if there is a problem; warnings alone give 0.
      """)

  @Argument(help: "Segment name of a running peer, host:port.")
  var peer: String?

  @Option(help: "A metadata service to check too, such as etcd://host:2379.")
  var metadata: String?

  @Option(help: "How long to wait for each answer of the peer or service, such as 5 or 500ms.")
  var timeout = TimeSpan(seconds: 5)

  @Flag(help: "Prints one JSON object.")
  var json = false

  func validate() throws {
    try requireTimeout(timeout, atMost: 600)
    if peer?.contains("://") == true {
      throw ValidationError(
        "A peer is the name of a segment, such as host:port; --metadata names a metadata service.")
    }
  }

  func run() throws {
    silenceLog()
    var groups: [FindingGroup] = []
    func examine(_ title: String, _ findings: () -> [Finding]) {
      let group = FindingGroup(title: title, findings: findings())
      groups.append(group)
      if !json { printLine(group.text) }
    }
    examine("Program and machine", MachineChecks.run)
    examine("Addresses and ports", NetworkChecks.run)
    examine("Limits", LimitChecks.run)
    examine("Shared memory", SharedMemoryChecks.run)
    examine("Optional libraries", LibraryChecks.run)
    examine("Devices", DeviceChecks.run)
    examine("Environment variables", EnvironmentChecks.run)
    examine("Self test", SelfTest.run)
    if let metadata {
      examine("Metadata service") {
        MetadataChecks(uri: metadata, timeoutMilliseconds: timeout.milliseconds).run()
      }
    }
    if let peer {
      examine("Peer \(peer)") {
        PeerChecks(name: peer, timeoutMilliseconds: timeout.milliseconds).run()
      }
    }
    try finish(groups)
  }

  private func finish(_ groups: [FindingGroup]) throws {
    let problems = groups.reduce(0) { $0 + $1.count(.problem) }
    let warnings = groups.reduce(0) { $0 + $1.count(.warning) }
    if json {
      var report = JSONObject()
      report.add("version", programVersion)
      if let peer { report.add("peer", peer) }
      report.add("problems", problems)
      report.add("warnings", warnings)
      report.add("groups", groups.map(\.json))
      printLine(report.text)
    } else {
      printLine("\(problems) problem(s), \(warnings) warning(s)")
    }
    if problems > 0 { throw ExitCode(1) }
  }
}
