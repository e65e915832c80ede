import Glibc
import MooncakeSystem

/// Kernel, processors, memory and container.
enum MachineChecks {
  static func run() -> [Finding] {
    [version(), kernel(), processors(), memory(), container()]
  }

  private static func version() -> Finding { .ok("mooncake", programVersion) }

  private static func kernel() -> Finding {
    let release = SystemFiles.text("/proc/sys/kernel/osrelease") ?? "unknown"
    let parts = release.split { !$0.isNumber }.prefix(2).compactMap { Int($0) }
    if parts.count == 2, (parts[0], parts[1]) < (5, 10) {
      return .warning(
        "kernel", release, advice: "5.10 or newer is what this library is tested on; update it")
    }
    return .ok("kernel", "Linux \(release)")
  }

  private static func processors() -> Finding {
    let online = sysconf(Int32(_SC_NPROCESSORS_ONLN))
    let allowed =
      SystemFiles.field("Cpus_allowed_list", of: "/proc/self/status") ?? "unknown"
    let detail = "\(online) online, this process may use \(allowed)"
    if online == 1 {
      return .warning(
        "processors", detail,
        advice: "with one processor, lower the engine's spin time (--spin-us 1) so that waiting"
          + " threads do not hold up the others")
    }
    return .ok("processors", detail)
  }

  private static func memory() -> Finding {
    let total = SystemFiles.field("MemTotal", of: "/proc/meminfo") ?? "unknown"
    let available = SystemFiles.field("MemAvailable", of: "/proc/meminfo") ?? "unknown"
    return .ok("memory", "\(total) in all, \(available) available")
  }

  private static func container() -> Finding {
    var hints: [String] = []
    if SystemFiles.exists("/.dockerenv") { hints.append("Docker") }
    if SystemFiles.exists("/run/.containerenv") { hints.append("Podman") }
    if getenv("KUBERNETES_SERVICE_HOST") != nil { hints.append("Kubernetes") }
    var limits: [String] = []
    if let limit = cgroupValue("memory.max"), let bytes = UInt64(limit) {
      limits.append("memory \(readableBytes(bytes))")
    }
    if let quota = cgroupValue("cpu.max"), !quota.hasPrefix("max") {
      let numbers = quota.split(separator: " ").compactMap { Double($0) }
      if numbers.count == 2 && numbers[1] > 0 {
        limits.append("\(decimal(numbers[0] / numbers[1], places: 1)) processor(s)")
      }
    }
    let place = hints.isEmpty ? "no sign of one" : hints.joined(separator: ", ")
    let detail = limits.isEmpty ? place : "\(place); limited to " + limits.joined(separator: ", ")
    if hints.isEmpty { return .ok("container", detail) }
    return .ok(
      "container", detail,
      advice: "a peer outside reaches the addresses below only with host networking or published"
        + " ports (the RPC port and the data port)")
  }

  /// A file of the process's own control group (version 2).
  private static func cgroupValue(_ name: String) -> String? {
    let line = (SystemFiles.text("/proc/self/cgroup") ?? "").split(separator: "\n").first {
      $0.hasPrefix("0::")
    }
    guard let path = line?.dropFirst(3) else { return nil }
    return SystemFiles.text("/sys/fs/cgroup\(path)/\(name)")
      ?? SystemFiles.text("/sys/fs/cgroup/\(name)")
  }
}
