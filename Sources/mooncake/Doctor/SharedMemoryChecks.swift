import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// Whether processes of this host can use shared memory.
enum SharedMemoryChecks {
  static func run() -> [Finding] { [switches(), identity(), memoryFiles(), revocation()] }

  private static func switches() -> Finding {
    let subject = "shared memory"
    return Environment["MC_FORCE_TCP"] == nil
      ? .ok(subject, "on unless the option transports leaves it out")
      : .ok(subject, "off: MC_FORCE_TCP is set")
  }

  private static func identity() -> Finding {
    let subject = "host identity"
    if !HostIdentity.current.isEmpty { return .ok(subject, HostIdentity.current) }
    return .warning(
      subject, "unknown: /proc/sys/kernel/random/boot_id or /proc/self/ns cannot be read",
      advice: "without it processes of this host use TCP; mount /proc")
  }

  private static func memoryFiles() -> Finding {
    let subject = "memory files"
    do throws(Errno) {
      let file = try MemoryFile(name: "mooncake-doctor", byteCount: 4096)
      _ = try file.map(writable: true)
      try file.sealAgainstWriters()
      return .ok(subject, "can be made and sealed")
    } catch {
      return .warning(
        subject, "cannot be made: \(error)",
        advice: "processes of this host use TCP; it needs memfd_create and a kernel from 5.1 on")
    }
  }

  private static func revocation() -> Finding {
    let subject = "restartable sequences"
    if linux_rseq_area() != nil { return .ok(subject, "registered") }
    return .ok(
      subject, "not registered",
      advice: "unregistering memory waits for a stopped peer that is in the middle of a copy")
  }

  /// Whether a peer would be reached through shared memory.
  static func peer(
    _ engine: TransferEngine, _ segment: SegmentID, _ descriptor: SegmentDescriptor
  ) throws(MooncakeError) -> Finding {
    let subject = "shared memory"
    if descriptor.sharedMemoryName.isEmpty { return .ok(subject, "not offered by the peer") }
    if descriptor.hostIdentity != HostIdentity.current {
      return .ok(subject, "not used: the peer is on another host or in other namespaces")
    }
    guard let peer = try engine.sharedMemoryPeer(of: segment) else {
      let reason = try engine.sharedMemoryFailure(of: segment).map { ": " + $0 } ?? ""
      return .warning(
        subject, "the peer is on this host, but its memory cannot be reached\(reason)",
        advice: "both processes need the same user and free descriptors; TCP is used")
    }
    if peer.copiesByKernel { return .ok(subject, "used, for mapped and for ordinary memory") }
    return .warning(
      subject, "used for memory of mooncake_memory_allocate() only: the kernel refuses to copy",
      advice: "sysctl -w kernel.yama.ptrace_scope=0, or CAP_SYS_PTRACE; TCP is used for the rest")
  }
}
