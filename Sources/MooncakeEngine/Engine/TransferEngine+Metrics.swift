import MooncakeBase
import MooncakeSystem
import Synchronization

extension TransferEngine {
  /// Where peers reach the data port, "host:port".
  public var dataAddress: String { transport.server.address.description }

  /// Counters and gauges in the Prometheus text format.
  public func metrics() -> String {
    let tcp = transport.counters
    let rpc = rpcCounters
    let shared = sharedMemory?.counters ?? SharedMemoryCounters()
    var text = ""
    func add(_ name: String, _ kind: String, _ help: String, _ value: some BinaryInteger) {
      text += "# HELP mooncake_\(name) \(help)\n# TYPE mooncake_\(name) \(kind)\n"
      text += "mooncake_\(name){segment=\"\(escaped(self.name))\"} \(value)\n"
    }
    func counter(_ name: String, _ help: String, _ value: UInt64) {
      add(name + "_total", "counter", help, value)
    }
    counter(
      "read_bytes", "Bytes read from peers.",
      tcp.readBytes.load(ordering: .relaxed) &+ shared.readBytes.load(ordering: .relaxed))
    counter(
      "written_bytes", "Bytes written to peers.",
      tcp.writtenBytes.load(ordering: .relaxed) &+ shared.writtenBytes.load(ordering: .relaxed))
    counter(
      "completed_slices", "Slices completed.",
      tcp.completedSlices.load(ordering: .relaxed)
        &+ shared.completedSlices.load(ordering: .relaxed))
    counter(
      "failed_slices", "Slices that failed, timed out or were canceled.",
      tcp.failedSlices.load(ordering: .relaxed) &+ shared.failedSlices.load(ordering: .relaxed))
    addSharedMemory(shared, counter, add)
    counter("retried_slices", "Slices queued again.", tcp.retries.load(ordering: .relaxed))
    counter(
      "connect_failures", "Data connections that could not be made.",
      tcp.clientConnectFailures.load(ordering: .relaxed))
    counter(
      "disconnects", "Data connections lost or taken out of use.",
      tcp.clientDisconnects.load(ordering: .relaxed))
    add(
      "client_connections", "gauge", "Data connections to peers.",
      tcp.clientConnections.load(ordering: .relaxed))
    add(
      "fenced_connections", "gauge",
      "Connections given up with unanswered writes that the peer has not closed yet.",
      tcp.fences.load(ordering: .relaxed))
    add(
      "server_connections", "gauge", "Data connections of peers.",
      tcp.connections.load(ordering: .relaxed))
    counter(
      "served_requests", "Requests of peers served.", tcp.servedRequests.load(ordering: .relaxed))
    counter(
      "refused_requests", "Requests of peers refused.", tcp.rejections.load(ordering: .relaxed))
    counter(
      "served_received_bytes", "Bytes that peers sent to the data port.",
      tcp.servedReceivedBytes.load(ordering: .relaxed))
    counter(
      "served_sent_bytes", "Bytes that the data port sent to peers.",
      tcp.servedSentBytes.load(ordering: .relaxed))
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

  private func addSharedMemory(
    _ shared: SharedMemoryCounters, _ counter: (String, String, UInt64) -> Void,
    _ add: (String, String, String, Int) -> Void
  ) {
    counter(
      "shared_memory_read_bytes", "Of these, bytes read through shared memory.",
      shared.readBytes.load(ordering: .relaxed))
    counter(
      "shared_memory_written_bytes", "Of these, bytes written through shared memory.",
      shared.writtenBytes.load(ordering: .relaxed))
    counter(
      "shared_memory_requests", "Slices completed through shared memory.",
      shared.completedSlices.load(ordering: .relaxed))
    counter(
      "shared_memory_fallbacks", "Slices for a peer of the same host that fell back to TCP.",
      shared.refusedSlices.load(ordering: .relaxed))
    add(
      "shared_memory_peers", "gauge", "Peers that reach the buffers through shared memory.",
      sharedMemory?.server.connectionCount ?? 0)
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
