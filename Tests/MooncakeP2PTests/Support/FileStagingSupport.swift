import Glibc
import MooncakeP2P
import MooncakeSystem

extension Manifest {
  /// A manifest of files whose bytes do not matter.
  static func ofFiles(_ files: [FileList.File]) throws -> Manifest {
    let layout = try ShardLayout(
      bufferSizes: files.map(\.size).filter { $0 > 0 }, shardBytes: 1 << 20)
    return try Manifest(
      layout: layout,
      digests: Array(repeating: Digest(high: 0, low: 0), count: layout.shardCount),
      attributes: FileList(files).json)
  }
}

/// Files, described by a text, on their way into a directory.
func staging(
  _ directory: String, payload: String = "p", replacesFiles: Bool = false, exchanges: Bool = true,
  sync: DiskSync = .system
) -> FileStaging {
  FileStaging(
    directory: FilePath(directory), payload: payload, replacesFiles: replacesFiles,
    exchanges: exchanges, sync: sync)
}

/// Runs something with the rights of a user who may not write everywhere. Root switches to another
/// user, who then owns the directory, on a separate thread.
func asOrdinaryUser<Result: Sendable>(
  _ scratch: ScratchDirectory, _ body: @escaping @Sendable () throws -> Result
) throws -> Result {
  if geteuid() != 0 { return try body() }
  // The library's wrappers change all threads; the system calls only their own.
  #if arch(x86_64)
    let calls = [119, 117]
  #else
    let calls = [149, 147]
  #endif
  typealias SystemCall = @convention(c) (Int, Int, Int, Int) -> Int
  let system = unsafeBitCast(dlsym(nil, "syscall"), to: SystemCall.self)
  let nobody = 65534
  chown(scratch.path, UInt32(nobody), UInt32(nobody))
  let outcome = Lock<Swift.Result<Result, any Error>?>(nil)
  let thread = try WorkerThread.start(name: "nobody") {
    // setresgid and setresuid, effective IDs only.
    for call in calls { _ = system(call, -1, nobody, -1) }
    let result = Swift.Result { try body() }
    outcome.withLock { $0 = result }
  }
  thread.join()
  return try outcome.withLock { $0! }.get()
}
