import ArgumentParser

/// The direction of the bytes, seen from the initiator.
enum Operation: String, ExpressibleByArgument, CaseIterable {
  case read
  case write
  /// Batches of reads and of writes, alternating.
  case mixed
}

/// The order in which blocks of the target are visited.
enum AccessPattern: String, ExpressibleByArgument, CaseIterable {
  case sequential
  case random
  /// The first blocks again and again.
  case same
  /// One block again and again, from and to the same local memory, as `ucx_perftest` does.
  case fixed
}

/// When a run ends.
enum RunLength {
  case nanoseconds(UInt64)
  /// A number of batches per thread.
  case iterations(UInt64)
}

/// One row of a measurement: what to move, how, and for how long.
struct Workload {
  var operation: Operation
  var pattern: AccessPattern
  var blockBytes: Int
  var batchSize: Int
  var threadCount: Int
  var length: RunLength
  var warmupNanoseconds: UInt64
  /// Whether single requests go through submit and wait, too.
  var usesBatches: Bool
  /// Contents to check against; nil for no check.
  var verification: Verification?
  var timeoutMilliseconds: UInt64

  struct Verification {
    var contents: BlockPattern
    /// Whether the target already contains the pattern, so that it need not be written first.
    var isFilledIn: Bool
  }

  var writesFirst: Bool {
    guard let verification else { return false }
    return operation != .write && !verification.isFilledIn
  }

  var batchBytes: Int { blockBytes * batchSize }
}
