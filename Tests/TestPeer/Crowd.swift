// One engine and many peers:
//   many COUNT LENGTH               serves with COUNT engines; prints "NAME ADDRESS LENGTH" of each
//   crowd tcp|shm read|write BLOCK  reads such lines and an empty one, opens all segments and reads
//     from each; prints "open THREADS DESCRIPTORS KIB", what that added to the process. Then each
//     line "MILLISECONDS" keeps two requests of BLOCK bytes in flight to every peer for so long and
//     prints the bytes that each has moved.

import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Many peers in one process.
struct ManyPeers {
  var count: Int
  var byteCount: Int

  func run() throws {
    var engines: [TransferEngine] = []
    defer { for engine in engines { engine.close() } }
    for _ in 0..<count {
      let engine = try TransferEngine()
      engines.append(engine)
      let memory = try engine.allocate(
        length: UInt64(byteCount), access: [.remoteRead, .remoteWrite])
      memset(memory, 0x5A, byteCount)
      say("\(engine.name) \(UInt(bitPattern: memory)) \(byteCount)")
    }
    var byte: UInt8 = 0
    while read(STDIN_FILENO, &byte, 1) > 0 {}
  }
}

/// One engine that keeps all of them busy.
final class Crowd: @unchecked Sendable {
  // Unchecked: `ended` is locked, the rest is used by the main thread.
  private struct Peer {
    var segment: SegmentID
    var address: UInt64
    var memory: UnsafeMutableRawPointer
    var batch: BatchID = 0
    var movedBytes = 0
  }

  private let engine: TransferEngine
  private let opcode: Opcode
  private let blockBytes: Int
  private var peers: [Peer] = []
  private let ended = Lock<[Int]>([])
  private let bell = Futex()

  private static let requestCount = 2

  init(_ words: [String]) throws {
    guard words.count == 3, let blockBytes = Int(words[2]) else {
      fail("crowd tcp|shm read|write BLOCK")
    }
    var options = TransferEngine.Options()
    options.transports = words[0] == "tcp" ? ["tcp"] : ["shm", "tcp"]
    // Peers die here on purpose.
    setenv("MC_LOG_LEVEL", "ERROR", 0)
    engine = try TransferEngine(options)
    opcode = words[1] == "write" ? .write : .read
    self.blockBytes = blockBytes
  }

  func run() throws {
    defer { engine.close() }
    let before = Footprint.now()
    while let line = readLine(), !line.isEmpty { try open(line) }
    // What all peers share, threads and stacks, is created with the first.
    for index in peers.indices { try submit(index, byteCount: 64) }
    while ended.withLock({ $0.count }) < peers.count { usleep(1000) }
    _ = finish(counting: false)
    let after = Footprint.now()
    say(
      "open \(after.threads - before.threads) \(after.descriptors - before.descriptors)"
        + " \(after.residentKiB - before.residentKiB)")
    while let line = readLine(), let milliseconds = UInt64(line) {
      for index in peers.indices { peers[index].movedBytes = 0 }
      try move(milliseconds)
      say(peers.map { String($0.movedBytes) }.joined(separator: " "))
    }
  }

  private func open(_ line: String) throws {
    let words = line.split(separator: " ")
    guard words.count == 3, let address = UInt64(words[1]) else { fail("no peer: \(line)") }
    peers.append(
      Peer(
        segment: try engine.openSegment(String(words[0])), address: address,
        memory: try engine.allocate(
          length: UInt64(Self.requestCount * blockBytes), access: .local)))
  }

  private func submit(_ index: Int, byteCount: Int) throws {
    let peer = peers[index]
    let requests = (0..<Self.requestCount).map { request in
      let offset = request * byteCount
      return TransferRequest(
        opcode: opcode, segment: peer.segment, source: peer.memory + offset,
        targetOffset: peer.address + UInt64(offset), length: UInt64(byteCount))
    }
    let batch = try engine.createBatch(capacity: Self.requestCount)
    peers[index].batch = batch
    try engine.setCallback(batch) { [self] _, _ in
      ended.withLock { $0.append(index) }
      bell.increment()
      bell.wakeAll()
    }
    try requests.withUnsafeBufferPointer { requests throws(MooncakeError) in
      try engine.submit(batch, requests, timeoutMilliseconds: 2000)
    }
  }

  private func move(_ milliseconds: UInt64) throws {
    let deadline = Deadline.after(milliseconds: milliseconds)
    for index in peers.indices { try submit(index, byteCount: blockBytes) }
    var running = peers.count
    while running > 0 {
      let value = bell.value
      let done = finish(counting: !deadline.hasPassed)
      running -= done.count
      if deadline.hasPassed {
        bell.wait(while: value, until: .after(milliseconds: 100))
        continue
      }
      for index in done { try submit(index, byteCount: blockBytes) }
      running += done.count
      if done.isEmpty { bell.wait(while: value, until: deadline) }
    }
  }

  /// Collects the batches that have ended; returns their peers.
  private func finish(counting: Bool) -> [Int] {
    let done = ended.withLock { ended in
      defer { ended = [] }
      return ended
    }
    for index in done {
      let status = try? engine.wait(peers[index].batch)
      if counting, status?.state == .completed {
        peers[index].movedBytes += Self.requestCount * blockBytes
      }
      try? engine.freeBatch(peers[index].batch)
    }
    return done
  }
}
