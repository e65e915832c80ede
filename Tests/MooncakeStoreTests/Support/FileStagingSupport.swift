import MooncakeStore
import MooncakeSystem

extension Manifest {
  /// The manifest of files, whose bytes do not matter.
  static func ofFiles(_ files: [FileList.File]) throws -> Manifest {
    let layout = try ShardLayout(
      bufferSizes: files.map(\.size).filter { $0 > 0 }, shardBytes: 1 << 20)
    return try Manifest(
      layout: layout,
      digests: Array(repeating: Digest(high: 0, low: 0), count: layout.shardCount),
      attributes: FileList(files).json)
  }
}

/// Files on their way into a directory, given as a text.
func staging(
  _ directory: String, payload: String = "p", replacesFiles: Bool = false, exchanges: Bool = true
) -> FileStaging {
  FileStaging(
    directory: FilePath(directory), payload: payload, replacesFiles: replacesFiles,
    exchanges: exchanges)
}
