import ArgumentParser

/// Which way the bytes go, seen from the initiator.
enum Operation: String, ExpressibleByArgument, CaseIterable {
  case read
  case write
  /// Batches of reads and of writes by turns.
  case mixed
}

/// In which order blocks of the target are visited.
enum AccessPattern: String, ExpressibleByArgument, CaseIterable {
  case sequential
  case random
  /// The first blocks again and again.
  case same
  /// One block again and again, from and to the same local memory, as `ucx_perftest` does it.
  case fixed
}

/// When a run ends.
enum RunLength {
  case nanoseconds(UInt64)
  /// Batches of each thread.
  case iterations(UInt64)
}

/// One row of a measurement: what is moved, how, and for how long.
struct Workload {
  var operation: Operation
  var pattern: AccessPattern
  var blockBytes: Int
  var batchSize: Int
  var threadCount: Int
  var length: RunLength
  var warmupNanoseconds: UInt64
  /// Whether one-request batches go through submit and wait, too.
  var usesBatches: Bool
  /// Contents to check against; nil: nothing is checked.
  var verification: Verification?
  var timeoutMilliseconds: UInt64

  struct Verification {
    var contents: BlockPattern
    /// Whether the target already holds the pattern, so that it need not be written first.
    var isFilledIn: Bool
  }

  var writesFirst: Bool {
    guard let verification else { return false }
    return operation != .write && !verification.isFilledIn
  }

  var batchBytes: Int { blockBytes * batchSize }
}
