import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

/// Does what an engine does with a metadata service: connect, put, get, lease; then checks the
/// existing entries.
struct MetadataChecks {
  let uri: String
  let timeoutMilliseconds: UInt64

  /// Most owners that are probed.
  private static let ownerLimit = 256
  private static let leaseMilliseconds: UInt64 = 2000
  /// Services may count in seconds or have a minimum lease; longer leases are not waited for.
  private static let longestLeaseMilliseconds: UInt64 = 60_000

  func run() -> [Finding] {
    let parsed: MetadataURI
    let directory: MetadataDirectory
    do throws(MooncakeError) {
      parsed = try MetadataURI(parsing: uri)
      if parsed.service == .peerToPeer {
        return [.ok("service", "P2PHANDSHAKE: peers ask each other, there is nothing to check")]
      }
      directory = try MetadataDirectory(parsed)
    } catch {
      return [
        .problem("service", error.message, advice: "correct the URI or install the named library")
      ]
    }
    var findings: [Finding] = []
    let endpoints = parsed.endpoints.map(connect)
    let isAnyThere = endpoints.contains { $0.level == .ok }
    findings += endpoints.map { finding in
      // The cluster's other endpoints can take over, so this is only a warning.
      var finding = finding
      if isAnyThere && finding.level == .problem { finding.level = .warning }
      return finding
    }
    do throws(MooncakeError) {
      try roundTrip(directory, &findings)
      try leases(directory, &findings)
    } catch {
      findings.append(.problem("requests", error.message, advice: advice(for: error)))
      return findings
    }
    findings += owners(directory)
    return findings
  }

  private var call: Call { Call(until: .after(milliseconds: timeoutMilliseconds)) }

  private func connect(_ endpoint: HostPort) -> Finding {
    do {
      let deadline = Deadline.after(milliseconds: timeoutMilliseconds)
      let addresses = try Resolver.resolve(
        endpoint.host, port: endpoint.port ?? 0, deadline: deadline)
      let begin = Clock.now()
      try ConnectTest.connect(to: addresses[0], deadline: deadline)
      let span = decimal(Double(Clock.elapsed(since: begin)) / 1e3, places: 0)
      return .ok("endpoint \(endpoint)", "accepts connections (\(span) µs)")
    } catch {
      return .problem(
        "endpoint \(endpoint)", "cannot connect: \(error)",
        advice: "is the service running there, and does no firewall drop the packets?")
    }
  }

  private func advice(for error: MooncakeError) -> String {
    switch error.code {
    case .accessDenied:
      "give user and password (MC_METADATA_USERNAME and MC_METADATA_PASSWORD; for Redis"
        + " MC_REDIS_USERNAME and MC_REDIS_PASSWORD), the token of an HTTP server"
        + " (MC_METADATA_HTTP_TOKEN) or the certificate files (MC_METADATA_CA_FILE,"
        + " MC_METADATA_CERT_FILE, MC_METADATA_KEY_FILE), and the user the right to the keys"
    case .timeout: "the service takes connections but does not answer: stopped, overloaded or full?"
    case .unreachable, .unresolved: "start the service, or correct the address"
    case .unsupported: "use a service that supports this"
    case .full: "give the service room, or raise its limit"
    default: "check that the URI names this kind of service, with its path"
    }
  }

  private func roundTrip(
    _ directory: MetadataDirectory, _ findings: inout [Finding]
  ) throws(MooncakeError) {
    let store = directory.store
    let entry = MetadataEntry(
      key: "\(directory.prefix)doctor/\(UInt64.random(in: 0 ... .max))", value: "{\"doctor\":1}")
    let begin = Clock.now()
    try store.put(entry, lease: nil, call)
    let found = try store.get(entry.key, call)
    _ = try store.delete(entry.key, call)
    let span = decimal(Double(Clock.elapsed(since: begin)) / 1e6 / 3, places: 2)
    if found == entry.value {
      findings.append(.ok("round trip", "put, get and delete take \(span) ms each"))
    } else {
      findings.append(
        .problem(
          "round trip", "a key just put reads as something else",
          advice: "check for a cache or a lagging replica in between"))
    }
  }

  /// Puts a key under a short lease and checks when it vanishes.
  private func leases(
    _ directory: MetadataDirectory, _ findings: inout [Finding]
  ) throws(MooncakeError) {
    let store = directory.store
    guard let lease = try store.grant(ttlMilliseconds: Self.leaseMilliseconds, call) else {
      findings.append(
        .warning(
          "leases", "this server has none: keys of killed processes stay",
          advice: "use mooncake metadata serve, etcd or Redis, or delete such keys yourself"))
      return
    }
    if lease.ttlMilliseconds > Self.longestLeaseMilliseconds {
      findings.append(
        .problem(
          "leases",
          "the service grants \(lease.ttlMilliseconds) ms where \(Self.leaseMilliseconds) were "
            + "asked for",
          advice: "keys of killed processes stay that long: is this the metadata service?"))
      return
    }
    let entry = MetadataEntry(
      key: "\(directory.prefix)doctor/\(UInt64.random(in: 0 ... .max))", value: "{\"doctor\":2}")
    try store.put(entry, lease: lease, call)
    guard try renewal(store, lease, entry, &findings) else { return }
    let begin = Clock.now()
    let latest = Deadline.after(milliseconds: lease.ttlMilliseconds + 3000)
    while try store.get(entry.key, call) != nil {
      if latest.hasPassed {
        _ = try store.delete(entry.key, call)
        findings.append(
          .problem(
            "leases", "a key with \(lease.ttlMilliseconds) ms to live is still there",
            advice: "the service's clock or its leader is in trouble: see its log"))
        return
      }
      sleepBriefly(nanoseconds: 50_000_000)
    }
    let span = Clock.elapsed(since: begin)
    let early = span + 200_000_000 < lease.ttlMilliseconds * 1_000_000
    let detail =
      "a key with \(lease.ttlMilliseconds) ms to live vanished after \(span / 1_000_000) ms"
    findings.append(
      early
        ? .problem(
          "leases", detail, advice: "the service's clock runs fast, or somebody deletes keys")
        : .ok("leases", detail))
  }

  /// Renews a key as engines do, and ends another lease; false if the renewal failed.
  private func renewal(
    _ store: any MetadataService, _ lease: MetadataLease, _ entry: MetadataEntry,
    _ findings: inout [Finding]
  ) throws(MooncakeError) -> Bool {
    guard try store.renew(lease, [entry], call) == .kept else {
      findings.append(
        .problem(
          "renewal", "a key just put is gone when its lease is renewed",
          advice: "does somebody else delete keys, or is there a replica that lags behind?"))
      return false
    }
    let other = MetadataEntry(key: entry.key + "/ended", value: entry.value)
    guard let second = try store.grant(ttlMilliseconds: Self.leaseMilliseconds, call) else {
      return true
    }
    try store.put(other, lease: second, call)
    try store.revoke(second, [other], call)
    findings.append(
      try store.get(other.key, call) == nil
        ? .ok("renewal", "a lease can be renewed and ended")
        : .problem(
          "renewal", "a key is still there after the end of its lease",
          advice: "the service's log says more; keys of ended processes stay until then"))
    return true
  }

  // MARK: What others have left

  private func owners(_ directory: MetadataDirectory) -> [Finding] {
    let prefix = directory.routeKey("")
    let routes: [MetadataEntry]
    let segments: [MetadataEntry]
    do throws(MooncakeError) {
      routes = try directory.store.listAll(prefix: prefix, call).entries
      segments = try directory.store.listAll(prefix: directory.prefix + "ram/", call).entries
    } catch {
      if error.code == .unsupported {
        return [.ok("entries", "this server lists no keys, so they are not looked at")]
      }
      return [.warning("entries", error.message, advice: advice(for: error))]
    }
    var findings = [
      Finding.ok("entries", "\(segments.count) segment(s), \(routes.count) route(s)")
    ]
    for entry in segments {
      do throws(MooncakeError) { _ = try SegmentDescriptor(json: entry.value) } catch {
        findings.append(
          .warning(
            entry.key, error.message,
            advice: Self.deletion(of: entry.key, directory)))
      }
    }
    for entry in routes.prefix(Self.ownerLimit) {
      // By bytes: a slash and a combining mark after it are one character.
      let name = String(decoding: entry.key.utf8.dropFirst(prefix.utf8.count), as: UTF8.self)
      if let finding = owner(entry, directory, name) {
        findings.append(finding)
      }
    }
    if routes.count > Self.ownerLimit {
      findings.append(
        .ok("owners", "only the first \(Self.ownerLimit) were asked for a sign of life"))
    }
    return findings
  }

  /// nil if all is well.
  private func owner(
    _ entry: MetadataEntry, _ directory: MetadataDirectory, _ name: String
  ) -> Finding? {
    do throws(MooncakeError) {
      let route = try directory.route(to: name, call)
      try RPCClient.probe(
        route.description, Call(until: .after(milliseconds: min(timeoutMilliseconds, 1000))))
      return nil
    } catch {
      let commands = [entry.key, directory.segmentKey(name)].map {
        Self.deletion(of: $0, directory)
      }
      return .warning(
        "owner of \(name)", "gives no sign of life: \(error.message)",
        advice: "if its process is gone: \(commands.joined(separator: "; ")); keys with a lease "
          + "vanish by themselves")
    }
  }

  /// The shell command to delete a key. It is quoted, because anybody may have chosen the key.
  private static func deletion(of key: String, _ directory: MetadataDirectory) -> String {
    func quoted(_ word: String) -> String {
      let parts = word.split(separator: "'", omittingEmptySubsequences: false)
      return "'\(parts.joined(separator: #"'\''"#))'"
    }
    return "mooncake metadata delete --metadata \(quoted(directory.store.uri.description)) "
      + quoted(key)
  }
}
