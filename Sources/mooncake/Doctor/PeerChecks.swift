import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// Checks a transfer to a peer step by step: name, RPC port, descriptor, data port, one byte.
struct PeerChecks {
  let name: String
  let timeoutMilliseconds: UInt64

  func run() -> [Finding] {
    let peer: HostPort
    do throws(HostPortError) {
      peer = try HostPort(
        parsing: name, defaultPort: HandshakeSettings.fromEnvironment().defaultPort)
    } catch {
      return [
        .problem("name", "\"\(name)\" is not host:port: \(error)", advice: "use host:rpc_port")
      ]
    }
    var findings: [Finding] = []
    let port = peer.port ?? HandshakeSettings.fromEnvironment().defaultPort
    guard let addresses = resolve(peer.host, port: port, &findings) else { return findings }
    guard connects(addresses, what: "RPC port", &findings) else { return findings }
    do throws(MooncakeError) {
      try examine(port: port, &findings)
    } catch {
      findings.append(
        .problem(
          "engine", error.message,
          advice: "no engine can be started here to ask the peer with; see the self test"))
    }
    return findings
  }

  private var deadline: Deadline { .after(milliseconds: timeoutMilliseconds) }

  private func resolve(
    _ host: String, port: UInt16, _ findings: inout [Finding]
  ) -> [SocketAddress]? {
    do throws(ResolveError) {
      let addresses = try Resolver.resolve(host, port: port, deadline: deadline)
      findings.append(.ok("name", addresses.map(\.description).joined(separator: ", ")))
      return addresses
    } catch {
      findings.append(
        .problem(
          "name", "\(host) does not resolve: \(error)",
          advice: "check the spelling, DNS and /etc/hosts, or use the numeric address"))
      return nil
    }
  }

  /// Connects to the first address that accepts.
  private func connects(
    _ addresses: [SocketAddress], what: String, _ findings: inout [Finding]
  ) -> Bool {
    var failures: [String] = []
    for address in addresses {
      let begin = Clock.now()
      do throws(Errno) {
        try ConnectTest.connect(to: address, deadline: deadline)
        let span = decimal(Double(Clock.elapsed(since: begin)) / 1e3, places: 0)
        findings.append(.ok(what, "\(address.description) accepts connections (\(span) µs)"))
        return true
      } catch {
        failures.append("\(address.description): \(error)")
        if address == addresses.last {
          findings.append(
            .problem(
              what, "cannot connect to " + failures.joined(separator: "; "),
              advice: advice(for: error, what)))
        }
      }
    }
    return false
  }

  private func advice(for error: Errno, _ what: String) -> String {
    switch error {
    case .connectionRefused:
      "nothing listens there: is the peer running, is this its \(what), and does it listen on an"
        + " address that this machine reaches (not only 127.0.0.1)?"
    case .timedOut:
      "no answer: look for a firewall between the machines, or a peer that is stopped or overloaded"
    default: "check the address, the route (ip route get ADDRESS) and firewalls"
    }
  }

  private func examine(port: UInt16, _ findings: inout [Finding]) throws(MooncakeError) {
    var options = TransferEngine.Options()
    options.defaultTimeoutMilliseconds = timeoutMilliseconds
    let engine = try TransferEngine(options)
    defer { engine.close() }
    probe(engine, &findings)
    guard let (segment, descriptor) = fetch(engine, &findings) else { return }
    describe(descriptor, &findings)
    if descriptor.tcpDataPort == 0 {
      readByte(engine, segment, descriptor, &findings)
    } else if reachesData(descriptor, &findings) {
      // Only TCP, because shared memory would hide problems with the ports of a peer on this host.
      options.transports = ["tcp"]
      let other = try TransferEngine(options)
      defer { other.close() }
      let segment = try other.openSegment(name, timeoutMilliseconds: timeoutMilliseconds)
      readByte(other, segment, descriptor, &findings)
    }
    findings.append(try SharedMemoryChecks.peer(engine, segment, descriptor))
    try listPaths(engine, segment, &findings)
  }

  /// What moves the bytes of a program with the default options, and why not another.
  private func listPaths(
    _ engine: TransferEngine, _ segment: SegmentID, _ findings: inout [Finding]
  ) throws(MooncakeError) {
    let reports = try engine.paths(to: segment)
    let used = reports.first { $0.state == "used" }
    findings.append(
      used.map { .ok("paths", "\($0.transport) is used") }
        ?? .problem("paths", "none works", advice: "see what each says; TCP reaches most peers"))
    for report in reports where report.state != "used" {
      let reason = report.reason.isEmpty ? "" : ": \(report.reason)"
      findings.append(.ok("path \(report.transport)", report.state + reason))
    }
  }

  private func probe(_ engine: TransferEngine, _ findings: inout [Finding]) {
    let begin = Clock.now()
    do throws(MooncakeError) {
      try engine.probe(name, timeoutMilliseconds: timeoutMilliseconds)
      let span = decimal(Double(Clock.elapsed(since: begin)) / 1e3, places: 0)
      findings.append(.ok("probe", "answered in \(span) µs"))
    } catch {
      findings.append(
        .warning(
          "probe", error.message,
          advice: "Mooncake before 0.3.11 does not know it; else the peer hangs or this is another"
            + " service's port"))
    }
  }

  private func fetch(
    _ engine: TransferEngine, _ findings: inout [Finding]
  ) -> (Int32, SegmentDescriptor)? {
    do throws(MooncakeError) {
      let segment = try engine.openSegment(name, timeoutMilliseconds: timeoutMilliseconds)
      return (segment, try engine.descriptor(of: segment))
    } catch {
      findings.append(
        .problem(
          "segment descriptor", error.message,
          advice: "check that this is the RPC port of a Mooncake peer and that it has started a"
            + " transport"))
      return nil
    }
  }

  private func describe(_ descriptor: SegmentDescriptor, _ findings: inout [Finding]) {
    let kind = descriptor.incarnation == 0 ? "a Mooncake peer" : "a libmooncake peer"
    findings.append(
      .ok(
        "segment descriptor", "\(descriptor.name), protocol \(descriptor.protocolName), \(kind)"))
    let bytes = descriptor.buffers.reduce(0) { $0 &+ $1.length }
    if descriptor.buffers.isEmpty {
      findings.append(
        .warning(
          "buffers", "none", advice: "register memory at the peer before transferring to it"))
    } else {
      findings.append(.ok("buffers", "\(descriptor.buffers.count), \(readableBytes(bytes)) in all"))
    }
    if descriptor.tcpDataPort == 0 { return }
    let version = descriptor.tcpProtocolVersion
    if version >= 2 {
      findings.append(.ok("TCP framing", "version \(version): every write is acknowledged"))
    } else {
      findings.append(
        .warning(
          "TCP framing", "version 1: a write is not acknowledged",
          advice: "update the peer to Mooncake 0.3.12 or newer, or to libmooncake"))
    }
  }

  private func reachesData(
    _ descriptor: SegmentDescriptor, _ findings: inout [Finding]
  ) -> Bool {
    let owner = try? HostPort(parsing: descriptor.name)
    let host = descriptor.tcpDataHost.isEmpty ? owner?.host ?? "" : descriptor.tcpDataHost
    guard let addresses = resolve(host, port: descriptor.tcpDataPort, what: "data host", &findings)
    else { return false }
    return connects(addresses, what: "data port", &findings)
  }

  private func resolve(
    _ host: String, port: UInt16, what: String, _ findings: inout [Finding]
  ) -> [SocketAddress]? {
    do throws(ResolveError) {
      return try Resolver.resolve(host, port: port, deadline: deadline)
    } catch {
      findings.append(
        .problem(
          what, "the peer advertises \"\(host)\", which does not resolve here: \(error)",
          advice: "start the peer with an advertised address that this machine can reach"))
      return nil
    }
  }

  /// Reads the first byte of the first buffer that allows it.
  private func readByte(
    _ engine: TransferEngine, _ segment: Int32, _ descriptor: SegmentDescriptor,
    _ findings: inout [Finding]
  ) {
    guard let buffer = descriptor.buffers.first(where: { $0.access.contains(.remoteRead) }) else {
      if !descriptor.buffers.isEmpty {
        findings.append(.ok("transfer", "not tried: no buffer may be read"))
      }
      return
    }
    do throws(MooncakeError) {
      let memory = try engine.allocate(length: 1, access: .local)
      let begin = Clock.now()
      try engine.transfer(
        TransferRequest(
          opcode: .read, segment: segment, source: memory, targetOffset: buffer.address, length: 1))
      let span = decimal(Double(Clock.elapsed(since: begin)) / 1e3, places: 0)
      findings.append(.ok("transfer", "read one byte of its first buffer in \(span) µs"))
    } catch {
      findings.append(
        .problem(
          "transfer", error.message,
          advice: "the ports answer but data does not move; look at the peer's log"))
    }
  }
}
