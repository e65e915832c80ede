// Gets a payload of the store from all of its holders, verifies each shard, and writes it to a
// file.
//
//   StoreGet [--bind ADDRESS] METADATA_URI NAME FILE
import ModelTransfer
import MooncakeEngine
import MooncakeP2P

@main
enum StoreGet {
  static func main() {
    do {
      let arguments = try Arguments(known: ["--bind"])
      guard arguments.plain.count == 3 else {
        throw ExampleError("name a metadata service, a payload and a file")
      }
      var options = TransferEngine.Options()
      options.metadataURI = arguments.plain[0]
      options.bindAddress = arguments["--bind"]
      let store = try P2PStore(engineOptions: options)
      // Stops being a holder and frees the memory.
      defer { store.close() }
      // No buffers: the engine allocates a single one.
      let result = try store.get(arguments.plain[1])
      print(
        "got \(result.info.name) version \(result.info.version.map { "\($0)" } ?? "none")",
        "size \(result.info.size) seconds \(Double(result.nanoseconds) / 1e9)",
        result.isVerified ? "verified" : "unverified")
      for source in result.sources { print("  \(source.byteCount) bytes from \(source.segment)") }
      // A real program would use the memory instead.
      let bytes = result.buffers.map {
        UnsafeRawBufferPointer(start: $0.address, count: Int($0.length))
      }
      try writeFile(
        bytes.first ?? UnsafeRawBufferPointer(start: nil, count: 0), to: arguments.plain[2])
    } catch {
      exitWithFailure("store-get", error)
    }
  }
}
