import ArgumentParser
import MooncakeBase
import MooncakeEngine

/// Reads and writes a target's buffer and measures the rate.
struct BenchInitiatorCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "initiator",
    abstract: "Reads and writes a target's buffer and measures the rate.",
    discussion: """
      --block-size, --batch-size and --threads take lists such as 4KiB,64KiB,1MiB: one row for \
      each combination. With several segments, the requests of a batch go to them in rotation. \
      Rates count 1 GB as 10^9 bytes; latencies are those of a whole batch. With --verify the \
      rates include the time for checking. Exit code 1 if any transfer failed or any byte was \
      wrong.
      """)

  @OptionGroup var engine: EngineArguments

  @Option(help: "Segment name that the target printed, host:port; a list for several targets.")
  var segment: Sweep<String>

  @Option(help: "Which of the segment's buffers, counted from 0 in order of address.")
  var bufferIndex: Int = 0

  @Option(help: "read, write or mixed.")
  var operation = Operation.read

  @Option(
    name: .customLong("protocol"), help: "shm: shared memory if the peer is on this host; or tcp.")
  var protocolName = "shm"

  @Option(help: "Bytes of one request.")
  var blockSize = Sweep(ByteCount(64 << 10))

  @Option(help: "Requests submitted and waited for together.")
  var batchSize = Sweep(128)

  @Option(help: "Threads that submit.")
  var threads = Sweep(1)

  @Option(help: "How long to measure, such as 500ms or 1m; default: 5 seconds.")
  var duration: TimeSpan?

  @Option(help: "Batches of each thread to measure, instead of a duration.")
  var iterations: UInt64?

  @Option(help: "How long to run before measuring; default: 0.5 seconds, or 0 with --iterations.")
  var warmup: TimeSpan?

  @Option(help: "Order of the target's blocks; same: the first ones; fixed: one, to one place.")
  var accessPattern = AccessPattern.sequential

  @Option(help: "Local memory that transfers use, for all threads together.")
  var localSize = ByteCount(256 << 20)

  @Flag(help: "Checks every byte; without --pattern the target's contents are overwritten.")
  var verify = false

  @Option(help: "Checks reads against a target started with --pattern and this seed.")
  var pattern: UInt64?

  @Flag(name: .customLong("async"), help: "Uses submit and wait for single requests, too.")
  var usesBatches = false

  @Flag(help: "Prints one JSON object per row.")
  var json = false

  func validate() throws {
    if !["shm", "tcp"].contains(protocolName) {
      throw ValidationError("--protocol \(protocolName) is not known; this build has: shm, tcp.")
    }
    if duration != nil && iterations != nil {
      throw ValidationError("Give --duration or --iterations, not both.")
    }
    if iterations == 0 { throw ValidationError("--iterations must be at least 1.") }
    if pattern != nil && operation != .read {
      throw ValidationError("--pattern checks reads; use --verify with --operation \(operation).")
    }
    if bufferIndex < 0 { throw ValidationError("--buffer-index must not be negative.") }
    if localSize.value > UInt64(Int.max) {
      throw ValidationError("--local-size does not fit the address space.")
    }
    for size in blockSize.values where size.value == 0 || size.value > 1 << 40 {
      throw ValidationError("--block-size must be between 1 and 1TiB.")
    }
    for size in batchSize.values { try require(1...1_048_576, size, "--batch-size") }
    for count in threads.values { try require(1...1024, count, "--threads") }
  }

  func run() throws {
    let stop = try StopRequest()
    silenceLog()
    let isClean = try reportingErrors {
      var options = engine.options
      options.transports = protocolName == "tcp" ? ["tcp"] : [protocolName, "tcp"]
      let engine = try TransferEngine(options)
      defer { engine.close() }
      return try measure(engine, stop)
    }
    if !isClean { throw ExitCode(1) }
  }

  /// Runs every combination until one fails or a signal arrives; returns whether all succeeded.
  private func measure(_ engine: TransferEngine, _ stop: StopRequest) throws(MooncakeError) -> Bool
  {
    var targets: [BenchTarget] = []
    defer { for target in targets { try? engine.closeSegment(target.segment) } }
    for name in segment.values { targets.append(try open(name, engine)) }
    let run = BenchRun(
      engine: engine, targets: targets, localBytes: Int(localSize.value), stop: stop)
    let report = BenchReport(
      isJSON: json, segments: segment.values, protocolName: protocolName)
    report.printTitles()
    for workload in workloads {
      let result = try run.run(workload)
      report.print(result)
      if result.tally.errorCount > 0 {
        printError("mooncake: \(result.tally.firstError ?? "transfers failed")")
        return false
      }
      if stop.isRequested || Output.hasFailed { break }
    }
    return true
  }

  private func open(
    _ name: String, _ engine: TransferEngine
  ) throws(MooncakeError) -> BenchTarget {
    let id = try engine.openSegment(name)
    let buffers = try engine.descriptor(of: id).buffers
    guard bufferIndex < buffers.count else {
      throw MooncakeError(
        .notFound,
        "segment \(name) has \(buffers.count) registered buffer(s), so there is no buffer"
          + " \(bufferIndex); register one at the target or choose another --buffer-index")
    }
    return BenchTarget(segment: id, buffer: buffers[bufferIndex])
  }

  private var workloads: [Workload] {
    var result: [Workload] = []
    for block in blockSize.values {
      for batch in batchSize.values {
        for count in threads.values {
          result.append(workload(blockBytes: Int(block.value), batchSize: batch, threads: count))
        }
      }
    }
    return result
  }

  private func workload(blockBytes: Int, batchSize: Int, threads: Int) -> Workload {
    let length: RunLength =
      if let iterations {
        .iterations(iterations)
      } else {
        .nanoseconds((duration ?? TimeSpan(seconds: 5)).nanoseconds)
      }
    // Counted runs do exactly what was asked for, so they warm up only on request.
    let warmup = self.warmup?.nanoseconds ?? (iterations == nil ? 500_000_000 : 0)
    var verification: Workload.Verification?
    if let pattern {
      verification = Workload.Verification(contents: BlockPattern(seed: pattern), isFilledIn: true)
    } else if verify {
      verification = Workload.Verification(contents: BlockPattern(seed: 1), isFilledIn: false)
    }
    return Workload(
      operation: operation, pattern: accessPattern, blockBytes: blockBytes, batchSize: batchSize,
      threadCount: threads, length: length, warmupNanoseconds: warmup, usesBatches: usesBatches,
      verification: verification, timeoutMilliseconds: engine.timeout.milliseconds)
  }
}
