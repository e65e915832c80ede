// Reads the model that a trainer serves into memory and proves by SHA-256 that it is complete.
//
//   Inferencer --info FILE [--output PATH] [--timeout-ms TIME]
import Glibc
import ModelTransfer
import MooncakeEngine

@main
enum Inferencer {
  /// Small enough to have several requests in flight, large enough to need only a few.
  private static let requestBytes: UInt64 = 16 << 20

  static func main() {
    do {
      try pull()
    } catch {
      exitWithFailure("inferencer", error)
    }
  }

  private static func pull() throws {
    let arguments = try Arguments(known: ["--info", "--output", "--timeout-ms"])
    guard let path = arguments["--info"], arguments.plain.isEmpty else {
      throw ExampleError("name the file that a trainer has written: --info FILE")
    }
    let offer = try Offer(path: path)
    guard let timeout = UInt64(arguments["--timeout-ms"] ?? "60000"), timeout > 0 else {
      throw ExampleError("--timeout-ms is no positive number")
    }

    let engine = try TransferEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(offer.segmentName, timeoutMilliseconds: timeout)
    let memory = try engine.allocate(length: offer.length, access: .local)
    let requests = requests(for: offer, segment: segment, memory: memory)

    let begin = seconds()
    try requests.withUnsafeBufferPointer {
      try engine.transfer($0, timeoutMilliseconds: timeout)
    }
    let duration = seconds() - begin

    let bytes = UnsafeRawBufferPointer(start: memory, count: Int(offer.length))
    let hash = try sha256(bytes)
    if hash != offer.hash {
      throw ExampleError("the data is wrong: its SHA-256 is \(hash), expected was \(offer.hash)")
    }
    if let output = arguments["--output"] { try writeFile(bytes, to: output) }
    let rate = Double(offer.length) / 1e9 / duration
    print(
      "bytes \(offer.length) seconds \(duration) gb_per_second \(rate) sha256 \(hash) verified")
  }

  /// One request for each part of the buffer, all for one batch.
  private static func requests(
    for offer: Offer, segment: Int32, memory: UnsafeMutableRawPointer
  ) -> [TransferRequest] {
    stride(from: 0, to: offer.length, by: Int(requestBytes)).map { offset in
      TransferRequest(
        opcode: .read, segment: segment, source: memory + Int(offset),
        targetOffset: offer.address + offset, length: min(requestBytes, offer.length - offset))
    }
  }

  private static func seconds() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
  }
}
