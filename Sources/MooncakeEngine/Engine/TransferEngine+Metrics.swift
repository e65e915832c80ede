import MooncakeBase
import MooncakeSystem
import Synchronization

extension TransferEngine {
  /// Counters and gauges in the Prometheus text format.
  public func metrics() -> String {
    let rpc = rpcCounters
    let all = transports.all
    let totals = all.map(\.totals)
    var text = ""
    func add(_ name: String, _ kind: String, _ help: String, _ value: some BinaryInteger) {
      text += "# HELP mooncake_\(name) \(help)\n# TYPE mooncake_\(name) \(kind)\n"
      text += "mooncake_\(name){segment=\"\(escaped(self.name))\"} \(value)\n"
    }
    func counter(_ name: String, _ help: String, _ value: UInt64) {
      add(name + "_total", "counter", help, value)
    }
    func sum(_ value: (TransportTotals) -> UInt64) -> UInt64 {
      totals.reduce(0) { $0 &+ value($1) }
    }
    counter("read_bytes", "Bytes read from peers.", sum(\.readBytes))
    counter("written_bytes", "Bytes written to peers.", sum(\.writtenBytes))
    counter("completed_slices", "Slices completed.", sum(\.completedSlices))
    counter(
      "failed_slices", "Slices that failed, timed out or were canceled.",
      sum(\.failedSlices) &+ router.failedSliceCount)
    text += transportMetrics(all, totals)
    for transport in all {
      for metric in transport.metrics {
        switch metric.kind {
        case .counter: counter(metric.name, metric.help, metric.value)
        case .gauge: add(metric.name, "gauge", metric.help, metric.value)
        }
      }
    }
    counter("rpc_metadata_requests", "Metadata requests answered.", rpc.metadataRequests)
    counter("rpc_notify_requests", "Notifications received.", rpc.notifyRequests)
    counter("rpc_probe_requests", "Probes answered.", rpc.probeRequests)
    counter("rpc_service_requests", "Calls of services answered.", rpc.serviceRequests)
    counter("rpc_rejected_connections", "RPC connections rejected.", rpc.rejectedConnections)
    add("registered_buffers", "gauge", "Buffers registered.", local.buffers.snapshot.buffers.count)
    add(
      "registered_bytes", "gauge", "Bytes registered.",
      local.buffers.snapshot.buffers.reduce(UInt64(0)) { $0 &+ $1.length })
    add("queued_notifications", "gauge", "Notifications not yet taken.", notifications.count)
    if let publisher { addMetadata(publisher.counters, counter, add) }
    return text
  }

  /// What each transport has moved, and how many paths it has.
  private func transportMetrics(
    _ transports: [any Transport], _ totals: [TransportTotals]
  ) -> String {
    let paths = segments.all.flatMap(\.route.paths)
    func block(_ name: String, _ kind: String, _ help: String, _ value: (Int) -> UInt64) -> String {
      transports.indices.reduce(
        "# HELP mooncake_\(name) \(help)\n# TYPE mooncake_\(name) \(kind)\n"
      ) { text, index in
        text + "mooncake_\(name){segment=\"\(escaped(self.name))\",transport=\""
          + "\(escaped(transports[index].name))\"} \(value(index))\n"
      }
    }
    func pathCount(_ index: Int, where isCounted: (any Path) -> Bool) -> UInt64 {
      let name = transports[index].name
      return UInt64(paths.count { $0.transportName == name && isCounted($0) })
    }
    return block("transport_read_bytes_total", "counter", "Bytes read, by transport.") {
      totals[$0].readBytes
    }
      + block("transport_written_bytes_total", "counter", "Bytes written, by transport.") {
        totals[$0].writtenBytes
      }
      + block("transport_paths", "gauge", "Paths to the open segments, by transport.") {
        pathCount($0) { _ in true }
      }
      + block("transport_failing_paths", "gauge", "Of these, paths that rest after a failure.") {
        pathCount($0) { $0.health.failure != nil }
      }
  }

  private func addMetadata(
    _ counters: MetadataPublisher.Counters, _ counter: (String, String, UInt64) -> Void,
    _ add: (String, String, String, Int) -> Void
  ) {
    add(
      "metadata_reachable", "gauge", "Whether the metadata service answered the last call.",
      counters.isReachable ? 1 : 0)
    add(
      "metadata_refused", "gauge", "Whether the metadata service refuses what is published.",
      counters.isRefused ? 1 : 0)
    counter("metadata_publications", "Publications of the descriptor.", counters.publications)
    counter(
      "metadata_repetitions", "Of these, repetitions of entries that the service had lost.",
      counters.repetitions)
    counter("metadata_renewals", "Renewals of the lease.", counters.renewals)
    counter("metadata_failures", "Calls to the metadata service that failed.", counters.failures)
  }

  private func escaped(_ label: String) -> String {
    label.reduce(into: "") { text, character in
      switch character {
      case "\\": text += "\\\\"
      case "\"": text += "\\\""
      case "\n": text += "\\n"
      default: text.append(character)
      }
    }
  }
}
