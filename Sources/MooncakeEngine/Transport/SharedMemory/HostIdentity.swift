import CLinux
import Glibc
import MooncakeSystem

/// Tells whether two processes can share memory: the boot of the machine and the namespaces that
/// process numbers and abstract socket names belong to. Host names prove neither.
package enum HostIdentity {
  /// Text to compare with a peer's; empty if the system does not tell. Read each time, because a
  /// process can enter another namespace, and a forked child can start in one.
  package static var current: String { describe() ?? "" }

  private static func describe() -> String? {
    guard let boot = readBootID() else { return nil }
    var parts = [boot]
    for space in ["pid", "net"] {
      var status = stat()
      if stat("/proc/self/ns/\(space)", &status) != 0 { return nil }
      parts.append(String(status.st_ino))
    }
    return parts.joined(separator: "/")
  }

  private static func readBootID() -> String? {
    guard
      let file = try? FileDescriptor.open("/proc/sys/kernel/random/boot_id", flags: O_RDONLY)
    else { return nil }
    var bytes = [UInt8](repeating: 0, count: 64)
    let count = read(file.rawValue, &bytes, bytes.count)
    let text = bytes.prefix(max(0, count)).prefix { $0 != UInt8(ascii: "\n") }
    return text.isEmpty ? nil : String(decoding: text, as: UTF8.self)
  }
}
