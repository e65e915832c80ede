import Glibc
import MooncakeSystem

/// The system's limits for one process.
enum LimitChecks {
  static func run() -> [Finding] {
    [
      openFiles(), lockedMemory(), socketBuffer("rmem"), socketBuffer("wmem"), tcpBuffer("rmem"),
      tcpBuffer("wmem"), backlog(), hugePages(), transparentHugePages(), tracing(), overcommit(),
    ]
  }

  private static func limit(_ resource: __rlimit_resource) -> (soft: UInt64, hard: UInt64)? {
    var value = rlimit()
    if getrlimit(Int32(resource.rawValue), &value) != 0 { return nil }
    return (UInt64(value.rlim_cur), UInt64(value.rlim_max))
  }

  private static func openFiles() -> Finding {
    guard let limit = limit(RLIMIT_NOFILE) else { return unknown("open files") }
    let detail = "\(count(limit.soft)) (at most \(count(limit.hard)))"
    if limit.soft < 1024 {
      return .problem(
        "open files", detail, advice: "each connection takes one: ulimit -n 65536 before the start")
    }
    if limit.soft < 4096 {
      return .warning(
        "open files", detail,
        advice: "enough for a few hundred peers; for more: ulimit -n 65536 before the start")
    }
    return .ok("open files", detail)
  }

  private static func lockedMemory() -> Finding {
    guard let limit = limit(__RLIMIT_MEMLOCK) else { return unknown("locked memory") }
    if limit.soft == UInt64.max { return .ok("locked memory", "unlimited") }
    let detail = readableBytes(limit.soft)
    let advice =
      "TCP does not need more; RDMA does: ulimit -l unlimited, or memlock in"
      + " /etc/security/limits.d"
    return SystemFiles.names(in: "/sys/class/infiniband").isEmpty
      ? .ok("locked memory", detail, advice: advice)
      : .warning("locked memory", detail, advice: advice)
  }

  private static func socketBuffer(_ kind: String) -> Finding {
    let subject = "net.core.\(kind)_max"
    guard let value = SystemFiles.numbers("/proc/sys/net/core/\(kind)_max").first else {
      return .ok(subject, "not visible in this namespace")
    }
    if value < 1 << 20 {
      return .ok(
        subject, readableBytes(value),
        advice: "enough on one host; for links with a long delay: sysctl -w \(subject)=16777216")
    }
    return .ok(subject, readableBytes(value))
  }

  private static func tcpBuffer(_ kind: String) -> Finding {
    let subject = "net.ipv4.tcp_\(kind)"
    let numbers = SystemFiles.numbers("/proc/sys/net/ipv4/tcp_\(kind)")
    guard numbers.count == 3 else { return .ok(subject, "not visible in this namespace") }
    let detail =
      "from \(numbers[0]), \(numbers[1]) at the start, up to \(readableBytes(numbers[2]))"
    if numbers[2] < 1 << 20 {
      return .warning(
        subject, detail,
        advice: "too small for full speed: sysctl -w \(subject)='4096 131072 6291456'")
    }
    return .ok(subject, detail)
  }

  private static func backlog() -> Finding {
    guard let value = SystemFiles.numbers("/proc/sys/net/core/somaxconn").first else {
      return .ok("net.core.somaxconn", "not visible in this namespace")
    }
    if value < 128 {
      return .warning(
        "net.core.somaxconn", "\(value)",
        advice: "peers that connect at once may be refused: sysctl -w net.core.somaxconn=4096")
    }
    return .ok("net.core.somaxconn", "\(value)")
  }

  private static func hugePages() -> Finding {
    let total = SystemFiles.field("HugePages_Total", of: "/proc/meminfo") ?? "0"
    let free = SystemFiles.field("HugePages_Free", of: "/proc/meminfo") ?? "0"
    return .ok("reserved huge pages", "\(total), free \(free)")
  }

  private static func transparentHugePages() -> Finding {
    let subject = "transparent huge pages"
    guard let modes = SystemFiles.text("/sys/kernel/mm/transparent_hugepage/enabled") else {
      return .ok(subject, "not offered by this kernel")
    }
    if modes.contains("[never]") {
      return .warning(
        subject, "off",
        advice: "first use of large buffers is several times slower; let programs ask for them:"
          + " echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")
    }
    return .ok(subject, modes)
  }

  private static func tracing() -> Finding {
    let subject = "kernel.yama.ptrace_scope"
    guard let value = SystemFiles.numbers("/proc/sys/kernel/yama/ptrace_scope").first else {
      return .ok(subject, "not used by this kernel")
    }
    if value == 0 { return .ok(subject, "0") }
    return .ok(
      subject, "\(value)",
      advice: "the kernel may refuse copies between processes of one host: memory of"
        + " mooncake_memory_allocate() is mapped instead, the rest goes over TCP")
  }

  private static func overcommit() -> Finding {
    let subject = "vm.overcommit_memory"
    let value = SystemFiles.numbers("/proc/sys/vm/overcommit_memory").first ?? 0
    if value == 2 {
      return .warning(
        subject, "2",
        advice: "buffers count against vm.overcommit_ratio as soon as they are allocated, not when"
          + " they are used; raise it if allocations fail")
    }
    return .ok(subject, "\(value)")
  }

  private static func unknown(_ subject: String) -> Finding {
    .warning(subject, "unknown: \(Errno.current)", advice: "check ulimit -a")
  }

  private static func count(_ value: UInt64) -> String {
    value == .max ? "unlimited" : "\(value)"
  }
}
