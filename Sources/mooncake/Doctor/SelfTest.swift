import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// Moves bytes between two engines in this process, over the loopback and through shared memory.
enum SelfTest {
  private static let sizes = [1, 4096, 65_537, (4 << 20) + 3]

  static func run() -> [Finding] {
    do throws(MooncakeError) {
      let findings = try transfers(over: "tcp", ["tcp"])
      if Environment["MC_FORCE_TCP"] != nil { return findings }
      return try findings + transfers(over: "shm", ["shm", "tcp"])
    } catch {
      return [
        .problem(
          "engine", error.message,
          advice: "this machine cannot run an engine as it is; see the limits and addresses above")
      ]
    }
  }

  private static func transfers(
    over transport: String, _ transports: [String]
  ) throws(MooncakeError) -> [Finding] {
    var options = TransferEngine.Options()
    options.transports = transports
    options.defaultTimeoutMilliseconds = 10_000
    let target = try TransferEngine(options)
    defer { target.close() }
    let initiator = try TransferEngine(options)
    defer { initiator.close() }
    var findings = [
      Finding.ok(
        "engine (\(transport))",
        "listens for requests on \(target.name), for data on \(target.dataAddress)")
    ]

    let largest = sizes[sizes.count - 1]
    let remote = try target.allocate(
      length: UInt64(largest), access: [.remoteRead, .remoteWrite])
    let source = try initiator.allocate(length: UInt64(largest), access: .local)
    let copy = try initiator.allocate(length: UInt64(largest), access: .local)
    let segment = try initiator.openSegment(target.name)
    for (number, size) in sizes.enumerated() {
      BlockPattern(seed: UInt64(number)).fill(source, count: size, offset: 0, generation: 0)
      memset(copy, 0x55, size)
      let begin = Clock.now()
      try move(initiator, .write, segment, source, address(remote), size)
      try move(initiator, .read, segment, copy, address(remote), size)
      let span = Double(Clock.elapsed(since: begin)) / 1e3
      findings.append(
        memcmp(source, copy, size) == 0
          ? .ok("\(size) bytes there and back (\(transport))", "\(decimal(span, places: 0)) µs")
          : .problem(
            "\(size) bytes there and back (\(transport))", "came back changed",
            advice: "check this machine's memory; then report this as a bug"))
    }
    return findings
  }

  private static func move(
    _ engine: TransferEngine, _ opcode: Opcode, _ segment: Int32,
    _ memory: UnsafeMutableRawPointer, _ target: UInt64, _ size: Int
  ) throws(MooncakeError) {
    let request = TransferRequest(
      opcode: opcode, segment: segment, source: memory, targetOffset: target,
      length: UInt64(size))
    try engine.transfer(request)
  }
}

extension TransferEngine {
  /// Submits one request and waits for it.
  func transfer(_ request: TransferRequest) throws(MooncakeError) {
    var failure: MooncakeError?
    withUnsafePointer(to: request) { pointer in
      do throws(MooncakeError) {
        try transfer(UnsafeBufferPointer(start: pointer, count: 1))
      } catch {
        failure = error
      }
    }
    if let failure { throw failure }
  }
}
