import Glibc
import MooncakeEngine
import MooncakeSystem

/// Addresses of this machine and the ports that engines take.
enum NetworkChecks {
  static func run() -> [Finding] { addresses() + [hostName(), portRange(), ephemeralPorts()] }

  private static func addresses() -> [Finding] {
    let entries = NetworkInterfaces.all().filter(\.isUp)
    var findings = entries.map { entry in
      Finding.ok(
        "address on \(entry.name)",
        entry.address.host + (entry.isRunning ? "" : " (no link)"))
    }
    if !entries.contains(where: { $0.address.isLoopback }) {
      findings.append(
        .problem(
          "loopback", "no interface has 127.0.0.1",
          advice: "bring it up: ip link set lo up"))
    }
    if NetworkInterfaces.firstUsable() == nil && NetworkInterfaces.firstUsable(ipv6: true) == nil {
      findings.append(
        .warning(
          "reachability", "this machine has only the loopback address",
          advice: "peers on other machines cannot connect; processes of this machine can"))
    }
    return findings
  }

  private static func hostName() -> Finding {
    var bytes = [CChar](repeating: 0, count: 256)
    if gethostname(&bytes, bytes.count - 1) != 0 {
      return .warning(
        "host name", "unknown: \(Errno.current)", advice: "set one: hostnamectl set-hostname NAME")
    }
    let name = bytes.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
    do throws(ResolveError) {
      let found = try Resolver.resolve(name, port: 0, deadline: .after(milliseconds: 2000))
      let list = found.map(\.host).joined(separator: ", ")
      if found.allSatisfy(\.isLoopback) {
        return .warning(
          "host name", "\(name) resolves to \(list)",
          advice: "advertise an address instead of this name, or correct /etc/hosts: a peer on"
            + " another machine would connect to itself")
      }
      return .ok("host name", "\(name) resolves to \(list)")
    } catch {
      return .warning(
        "host name", "\(name) does not resolve: \(error)",
        advice: "advertise an address instead of this name, or add it to DNS or /etc/hosts")
    }
  }

  /// How many ports of the drop-in API's range are free.
  private static func portRange() -> Finding {
    let range = HandshakeSettings.fromEnvironment().portRange
    var free = 0
    for port in range where isFree(port) { free += 1 }
    let detail = "\(free) of \(range.count) ports in \(range.lowerBound) to \(range.upperBound)"
    let widen = "set MC_MIN_RPC_PORT and MC_MAX_RPC_PORT to another range"
    if free < 2 {
      return .problem(
        "free ports for transfer_engine_c.h", detail,
        advice: "an engine needs two ports; \(widen), or end what holds them")
    }
    if free < 16 {
      return .warning("free ports for transfer_engine_c.h", detail, advice: widen)
    }
    return .ok("free ports for transfer_engine_c.h", detail)
  }

  private static func isFree(_ port: UInt16) -> Bool {
    guard let address = SocketAddress(numeric: "127.0.0.1", port: port) else { return false }
    return (try? Socket.listening(on: address, backlog: 1)) != nil
  }

  private static func ephemeralPorts() -> Finding {
    let numbers = SystemFiles.numbers("/proc/sys/net/ipv4/ip_local_port_range")
    guard numbers.count == 2, numbers[1] >= numbers[0] else {
      return .warning(
        "ports the system chooses", "unknown", advice: "check net.ipv4.ip_local_port_range")
    }
    let count = numbers[1] - numbers[0] + 1
    let detail = "\(numbers[0]) to \(numbers[1])"
    if count < 1000 {
      return .warning(
        "ports the system chooses", detail,
        advice: "few for many peers: sysctl -w net.ipv4.ip_local_port_range='32768 60999'")
    }
    return .ok("ports the system chooses", detail)
  }
}
