import MooncakeEngine

/// Which transports carried an engine's bytes.
struct EngineCounters {
  /// Bytes that this engine read and wrote, and how many of them through shared memory.
  var moved: UInt64 = 0
  var movedByMemory: UInt64 = 0
  /// Bytes sent to peers through sockets.
  var sentOverTCP: UInt64 = 0

  init(_ engine: TransferEngine) {
    for line in engine.metrics().split(separator: "\n") where !line.hasPrefix("#") {
      guard let name = line.split(separator: "{").first,
        let value = line.split(separator: " ").last.flatMap({ UInt64($0) })
      else { continue }
      switch name {
      case "mooncake_read_bytes_total", "mooncake_written_bytes_total": moved += value
      case "mooncake_shared_memory_read_bytes_total", "mooncake_shared_memory_written_bytes_total":
        movedByMemory += value
      case "mooncake_served_sent_bytes_total": sentOverTCP = value
      default: break
      }
    }
  }

  /// The transports that have carried bytes since `former`; nil if no bytes were moved.
  func carriers(since former: EngineCounters) -> String? {
    let memory = movedByMemory &- former.movedByMemory
    let all = moved &- former.moved
    if all == 0 { return nil }
    return memory == 0 ? "tcp" : memory >= all ? "shm" : "shm+tcp"
  }
}
