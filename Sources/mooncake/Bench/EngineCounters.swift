import MooncakeEngine

/// Which transports carried an engine's bytes.
struct EngineCounters {
  /// Bytes that this engine read and wrote, by transport.
  var moved: [String: UInt64] = [:]
  /// Bytes sent to peers through sockets.
  var sentOverTCP: UInt64 = 0

  init(_ engine: TransferEngine) {
    for line in engine.metrics().split(separator: "\n") where !line.hasPrefix("#") {
      guard let name = line.split(separator: "{").first,
        let value = line.split(separator: " ").last.flatMap({ UInt64($0) })
      else { continue }
      switch name {
      case "mooncake_transport_read_bytes_total", "mooncake_transport_written_bytes_total":
        moved[Self.transport(in: line), default: 0] += value
      case "mooncake_served_sent_bytes_total": sentOverTCP = value
      default: break
      }
    }
  }

  /// The label `transport` of a metric.
  private static func transport(in line: Substring) -> String {
    guard let begin = line.firstRange(of: "transport=\"") else { return "" }
    return String(line[begin.upperBound...].prefix { $0 != "\"" })
  }

  /// The transports that have carried bytes since `former`; nil if no bytes were moved.
  func carriers(since former: EngineCounters) -> String? {
    let names = moved.filter { $0.value > former.moved[$0.key] ?? 0 }.keys.sorted()
    return names.isEmpty ? nil : names.joined(separator: "+")
  }
}
