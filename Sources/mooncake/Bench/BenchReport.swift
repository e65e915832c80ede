import Histogram

/// Prints the results of runs as a table for people or as one JSON object a line.
struct BenchReport {
  private static let titles = [
    "operation", "block", "batch", "threads", "GB/s", "blocks/s", "p50 µs", "p90", "p99", "p99.9",
    "max", "CPU s/GB", "errors",
  ]
  private static let table = TextTable(
    titles: titles, minimum: [9, 8, 5, 7, 7, 10, 9, 9, 9, 9, 9, 8, 6])

  let isJSON: Bool
  let segments: [String]
  /// The protocol that was asked for.
  let protocolName: String

  func printTitles() {
    if isJSON { return }
    printLine(Self.table.line(Self.titles))
  }

  func print(_ result: BenchResult) {
    printLine(isJSON ? json(result).text : row(result))
  }

  private func row(_ result: BenchResult) -> String {
    let workload = result.workload
    return Self.table.line([
      workload.operation.rawValue, ByteCount(UInt64(workload.blockBytes)).description,
      "\(workload.batchSize)", "\(workload.threadCount)",
      decimal(result.bytesPerSecond / 1e9, places: 3),
      decimal(result.operationsPerSecond, places: 0), microseconds(result, 50),
      microseconds(result, 90), microseconds(result, 99), microseconds(result, 99.9),
      decimal(Double(result.tally.latencies.maxRecorded) / 1e3, places: 1),
      decimal(result.processorSecondsPerGigabyte, places: 3), "\(result.tally.errorCount)",
    ])
  }

  private func microseconds(_ result: BenchResult, _ percentile: Double) -> String {
    decimal(Double(result.tally.latencies.valueAtPercentile(percentile)) / 1e3, places: 1)
  }

  private func json(_ result: BenchResult) -> JSONObject {
    let workload = result.workload
    let tally = result.tally
    var json = JSONObject()
    json.add("version", programVersion)
    json.add("segment", segments.first ?? "")
    json.add("segments", segments.count)
    json.add("protocol", result.carriers ?? protocolName)
    json.add("operation", workload.operation.rawValue)
    json.add("access_pattern", workload.pattern.rawValue)
    json.add("block_size", workload.blockBytes)
    json.add("batch_size", workload.batchSize)
    json.add("threads", workload.threadCount)
    json.add("verified", workload.verification != nil)
    json.add("seconds", result.seconds, places: 6)
    json.add("bytes", tally.bytes)
    json.add("operations", tally.requests)
    json.add("batches", tally.batches)
    json.add("verified_bytes", tally.verifiedBytes)
    json.add("bytes_per_second", result.bytesPerSecond, places: 0)
    json.add("operations_per_second", result.operationsPerSecond, places: 1)
    json.add("latency_us", latencies(result))
    json.add("cpu_seconds", result.processorSeconds, places: 6)
    json.add("cpu_seconds_per_gb", result.processorSecondsPerGigabyte, places: 6)
    json.add("errors", tally.errorCount)
    if let error = tally.firstError { json.add("first_error", error) }
    json.add("interrupted", result.wasInterrupted)
    return json
  }

  private func latencies(_ result: BenchResult) -> JSONObject {
    let histogram = result.tally.latencies
    var json = JSONObject()
    let named = [("p50", 50.0), ("p90", 90), ("p99", 99), ("p999", 99.9)]
    for (name, percentile) in named {
      json.add(name, Double(histogram.valueAtPercentile(percentile)) / 1e3, places: 3)
    }
    json.add("max", Double(histogram.maxRecorded) / 1e3, places: 3)
    return json
  }
}
