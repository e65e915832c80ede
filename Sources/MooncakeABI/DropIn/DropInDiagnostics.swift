// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Section "Diagnostics" of transfer_engine_c.h, and from its "Engine" section topology and the end
// of the process.
import CMooncake
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Discovers RDMA devices, which no transport of this version uses.
@c @implementation
package func discoverTopology(_ engine: transfer_engine_t?) -> Int32 {
  dropInCall(engine) { _ throws(MooncakeError) in 0 }
}

/// Reports the load of NICs; there are none.
@c @implementation
package func getNicLoadStats(
  _ engine: transfer_engine_t?, _ stats: UnsafeMutablePointer<nic_load_stat_t>?,
  _ count: UnsafeMutablePointer<Int>?
) -> Int32 {
  dropInCall(engine) { _ throws(MooncakeError) in
    _ = try checkOutput(stats, "stats")
    try checkOutput(count, "count").pointee = 0
    return 0
  }
}

/// Describes NICs and which memory they are near.
@c @implementation
package func showLinks(
  _ engine: transfer_engine_t?, _ buf_out: UnsafeMutablePointer<CChar>?, _ buf_len: Int,
  _ json: Int32
) -> Int32 {
  dropInCall(engine) { record throws(MooncakeError) in
    let matrix = record.dropIn.matrix.withLock { $0 }
    try writeCut(json != 0 ? linksJSON(matrix) : linksText(matrix), buf_out, buf_len)
    return 0
  }
}

/// Destroys the engine when a signal or exit() ends the process.
@c @implementation
package func enableGracefulShutdown(_ engine: transfer_engine_t?) {
  _ = dropInCall(engine) { record throws(MooncakeError) in
    record.dropIn.endsWithProcess.store(true, ordering: .releasing)
    try GracefulShutdown.enable()
    return 0
  }
}

private func linksJSON(_ matrix: NICMatrix) -> String {
  var writer = JSONWriter()
  writer.beginObject()
  writer.name("local_nics")
  writer.beginArray()
  writer.endArray()
  writer.name("topology")
  matrix.write(to: &writer)
  writer.endObject()
  return writer.text
}

private func linksText(_ matrix: NICMatrix) -> String {
  let rows = matrix.rows.isEmpty ? "  empty\n" : matrix.description
  return "Local NICs: none in use (topology only)\nTopology:\n\(rows)"
}
