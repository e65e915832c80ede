import ArgumentParser
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// Offers a buffer for a `bench initiator` to read and write.
struct BenchTargetCommand: ParsableCommand {
  enum AccessChoice: String, ExpressibleByArgument, CaseIterable {
    case read
    case write
    case all

    var access: Access {
      switch self {
      case .read: .remoteRead
      case .write: .remoteWrite
      case .all: [.remoteRead, .remoteWrite]
      }
    }
  }

  static let configuration = CommandConfiguration(
    commandName: "target",
    abstract: "Offers a buffer to read and write until it is stopped.",
    discussion: """
      The first line on stdout is `segment NAME buffer ADDRESS LENGTH`, one for each engine. Ends \
      on SIGINT or SIGTERM and prints what was served.
      """)

  @OptionGroup var engine: EngineArguments

  @Option(help: "Engines in this process, each a peer with a name and a buffer of its own.")
  var engines = 1

  @Option(help: "Size of each buffer, such as 4096, 64MiB or 1GiB.")
  var bufferSize = ByteCount(1 << 30)

  @Option(help: "What peers may do with the buffer: read, write or all.")
  var access = AccessChoice.all

  @Flag(help: "Registers ordinary memory instead of memory that other processes can map.")
  var ordinary = false

  @Option(help: "Fills the buffer with the pattern of this seed, for `initiator --pattern`.")
  var pattern: UInt64?

  @Option(help: "Fills the buffer with this byte instead of zeros.")
  var fill: UInt8?

  @Option(help: "Ends after this time, such as 30, 500ms or 10m.")
  var duration: TimeSpan?

  @Flag(help: "Ends when stdin ends, too.")
  var untilEof = false

  func validate() throws {
    if bufferSize.value == 0 || bufferSize.value > UInt64(Int.max) {
      throw ValidationError("--buffer-size must be at least 1 and fit the address space.")
    }
    try require(1...4096, engines, "--engines")
    if engines > 1 && engine.listening.port != 0 {
      throw ValidationError("--port is for one engine; leave it out with --engines.")
    }
    if pattern != nil && fill != nil {
      throw ValidationError("Give --pattern or --fill, not both.")
    }
  }

  func run() throws {
    let stop = try StopRequest()
    try reportingErrors {
      var serving: [(engine: TransferEngine, memory: UnsafeMutableRawPointer)] = []
      defer { for (engine, _) in serving { engine.close() } }
      let length = bufferSize.value
      for _ in 0..<engines {
        let engine = try TransferEngine(self.engine.options)
        let memory = try makeBuffer(engine, length)
        serving.append((engine, memory))
        touch(memory, count: Int(length))
        printLine("segment \(engine.name) buffer \(hexadecimal(address(memory))) \(length)")
      }

      try Output.check()
      let begin = Clock.now()
      let deadline = duration.map { Deadline(nanoseconds: begin &+ $0.nanoseconds) } ?? .never
      stop.wait(until: deadline, orEndOfInput: untilEof)
      let cpu = decimal(ProcessorTime.now().seconds, places: 2)
      let seconds = decimal(Double(Clock.elapsed(since: begin)) / 1e9, places: 2)
      printLine("served for \(seconds) s, CPU time of the process \(cpu) s")
      for (engine, memory) in serving {
        if engines > 1 { printLine("segment \(engine.name)") }
        printTotals(of: engine)
        try ordinary ? engine.unregister(memory) : engine.free(memory)
      }
    }
  }

  private func makeBuffer(
    _ engine: TransferEngine, _ length: UInt64
  ) throws(MooncakeError) -> UnsafeMutableRawPointer {
    if !ordinary { return try engine.allocate(length: length, access: access.access) }
    let memory: UnsafeMutableRawPointer
    do throws(Errno) {
      // Never freed: in use until the process ends.
      memory = try MemoryMapping.anonymous(byteCount: Int(length)).release().baseAddress!
    } catch {
      throw MooncakeError(.outOfMemory, "\(length) bytes: \(error)")
    }
    try engine.register(memory, length: length, access: access.access)
    return memory
  }

  /// Writes to every page, so that no measurement includes page faults or reads the shared zero
  /// page.
  private func touch(_ memory: UnsafeMutableRawPointer, count: Int) {
    if let pattern {
      BlockPattern(seed: pattern).fill(memory, count: count, offset: 0, generation: 0)
    } else {
      memset(memory, Int32(fill ?? 0), count)
    }
  }

  private func printTotals(of engine: TransferEngine) {
    for line in engine.metrics().split(separator: "\n") where !line.hasPrefix("#") {
      if let value = line.split(separator: " ").last.flatMap({ Double($0) }), value != 0 {
        printLine(String(line))
      }
    }
  }
}

/// An address as a number, as in transfer requests.
func address(_ pointer: UnsafeMutableRawPointer) -> UInt64 { UInt64(UInt(bitPattern: pointer)) }
