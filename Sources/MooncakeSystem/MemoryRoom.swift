import Glibc

/// How much more memory this process can take before the OOM killer acts, on the machine or in its
/// control groups. Counts swap and file pages that can be dropped.
package struct MemoryRoom {
  package let byteCount: UInt64
  /// What limits it, for messages.
  package let limit: String

  /// nil if the system does not say. Tests put another folder for `root`.
  package static func now(root: String = "") -> MemoryRoom? {
    let memory = fields(of: root + "/proc/meminfo", unit: 1024)
    guard let available = memory["MemAvailable:"] else { return nil }
    let swap = memory["SwapFree:"] ?? 0
    var room = MemoryRoom(byteCount: available &+ swap, limit: "the machine's memory")
    for group in groups(root: root) {
      guard let left = group.left(swap: swap), left < room.byteCount else { continue }
      room = MemoryRoom(byteCount: left, limit: "the limit of control group \(group.folder)")
    }
    return room
  }

  private struct Group {
    var folder: String
    var isUnified: Bool

    /// nil if it sets no limit.
    func left(swap: UInt64) -> UInt64? {
      let names =
        isUnified
        ? ["memory.max", "memory.current"]
        : ["memory.limit_in_bytes", "memory.usage_in_bytes"]
      guard let limit = number(names[0]), let used = number(names[1]) else { return nil }
      let statistics = MemoryRoom.fields(of: folder + "/memory.stat", unit: 1)
      let prefix = isUnified ? "" : "total_"
      let droppable = ["inactive_file", "active_file"].reduce(UInt64(0)) {
        $0 &+ (statistics[prefix + $1] ?? 0)
      }
      let held = used - min(used, droppable)
      return (limit - min(limit, held)) &+ swapLeft(swap)
    }

    private func swapLeft(_ swap: UInt64) -> UInt64 {
      // The v1 interface limits memory and swap together, so swap is not counted there.
      guard isUnified, let used = number("memory.swap.current") else { return 0 }
      let limit = number("memory.swap.max") ?? .max
      return min(swap, limit - min(limit, used))
    }

    /// nil also for "max".
    private func number(_ name: String) -> UInt64? {
      MemoryRoom.text(of: folder + "/" + name).split(whereSeparator: \.isWhitespace).first
        .flatMap { UInt64($0) }
    }
  }

  /// The process's group and its ancestors.
  private static func groups(root: String) -> [Group] {
    var result: [Group] = []
    for line in text(of: root + "/proc/self/cgroup").split(separator: "\n") {
      let parts = line.split(separator: ":", maxSplits: 2, omittingEmptySubsequences: false)
      guard parts.count == 3 else { continue }
      let isUnified = parts[0] == "0" && parts[1].isEmpty
      if !isUnified && !parts[1].split(separator: ",").contains("memory") { continue }
      let base = root + (isUnified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory")
      var path = parts[2]
      while true {
        while path.last == "/" { path.removeLast() }
        result.append(Group(folder: base + path, isUnified: isUnified))
        guard let slash = path.lastIndex(of: "/") else { break }
        path = path[..<slash]
      }
    }
    return result
  }

  private static func fields(of path: String, unit: UInt64) -> [Substring: UInt64] {
    var fields: [Substring: UInt64] = [:]
    for line in text(of: path).split(separator: "\n") {
      let words = line.split(separator: " ")
      if words.count >= 2, let value = UInt64(words[1]) { fields[words[0]] = value &* unit }
    }
    return fields
  }

  private static func text(of path: String) -> String {
    guard let file = try? FileDescriptor.open(path, flags: O_RDONLY) else { return "" }
    var bytes = [UInt8](repeating: 0, count: 16 << 10)
    let count = bytes.withUnsafeMutableBytes { read(file.rawValue, $0.baseAddress, $0.count) }
    return String(decoding: bytes.prefix(max(0, count)), as: UTF8.self)
  }
}
