import ArgumentParser
import MooncakeEngine

/// Options of an engine; shared by the commands that start one.
struct EngineArguments: ParsableArguments {
  @Option(help: "How peers find each other: P2PHANDSHAKE or the URI of a metadata service.")
  var metadata = TransferEngine.Options().metadataURI

  @Option(help: "Name of the segment; can be chosen only with a metadata service.")
  var name: String?

  @OptionGroup var listening: ListenArguments

  @Option(help: "I/O threads per direction, 1 to 64; 0: the engine chooses.")
  var ioThreads: Int = TransferEngine.Options().ioThreads

  @Option(help: "Processors for the I/O threads, such as 0-3,8, or node:1; default: any.")
  var processors: String?

  @Option(help: "Data connections to one peer, 1 to 64; 0: the engine chooses.")
  var connections: Int = TransferEngine.Options().connectionsPerPeer

  @Option(help: "Microseconds to spin before sleeping while work is outstanding, 1 to 1000000.")
  var spinUs: Int = TransferEngine.Options().spinMicroseconds

  @Option(help: "Timeout of one transfer or request to a peer, such as 30, 500ms or 10m.")
  var timeout = TimeSpan(milliseconds: TransferEngine.Options().defaultTimeoutMilliseconds)

  func validate() throws {
    try require(0...64, ioThreads, "--io-threads")
    try require(0...64, connections, "--connections")
    try require(1...1_000_000, spinUs, "--spin-us")
    try requireTimeout(timeout, atMost: 86_400)
  }

  var options: TransferEngine.Options {
    var options = TransferEngine.Options()
    options.metadataURI = metadata
    options.name = name
    listening.set(&options)
    options.ioThreads = ioThreads
    options.processors = processors
    options.connectionsPerPeer = connections
    options.spinMicroseconds = spinUs
    options.defaultTimeoutMilliseconds = timeout.milliseconds
    return options
  }
}

/// Refuses a number out of a range, naming the option.
func require<Number: BinaryInteger>(
  _ range: ClosedRange<Number>, _ value: Number, _ option: String
) throws {
  if !range.contains(value) {
    throw ValidationError("\(option) must be between \(range.lowerBound) and \(range.upperBound).")
  }
}
