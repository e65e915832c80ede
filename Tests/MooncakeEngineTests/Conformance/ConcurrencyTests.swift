import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Threads that share a pair of engines do not disturb each other.
struct ConcurrencyTests {
  @Test(arguments: TransportKind.allCases)
  func batchesOfEightThreads(_ kind: TransportKind) throws {
    let threadCount = 8
    let share = 1 << 20
    let target = GuardedMemory(threadCount * share)
    try withPair(kind, registering: target) { pair in
      let complaints = Complaints()
      try onThreads(threadCount) { index in
        complaints.check("thread \(index)") {
          let worker = Worker(
            pair: pair, remote: target.address + index * share, share: share,
            seed: UInt8(index + 1), complaints: complaints)
          for round in 0..<12 { try worker.run(round) }
        }
      }
      #expect(complaints.all.isEmpty, "\(complaints.all)")
      #expect(target.areGuardsIntact)
      for index in 0..<threadCount {
        let bytes = UnsafeRawBufferPointer(start: target.address + index * share, count: share)
        #expect(Pattern(seed: UInt8(index + 1)).matches(bytes), "share \(index)")
      }
    }
  }

  /// Writes its share in pieces of many sizes, reads it back, and compares.
  private struct Worker {
    let pair: EnginePair
    let remote: UnsafeMutableRawPointer
    let share: Int
    let seed: UInt8
    let complaints: Complaints

    func run(_ round: Int) throws {
      let pattern = Pattern(seed: seed)
      let local = GuardedMemory(share)
      var generator = SeededRandom(seed: UInt64(seed) << 32 | UInt64(round))
      local.fill(pattern)
      try move(&generator) { pair.write(from: local.address + $0, to: remote + $0, $1) }
      local.fill(0)
      try move(&generator) { pair.read(into: local.address + $0, from: remote + $0, $1) }
      complaints.require(local.matches(pattern), "round \(round) of seed \(seed) read other bytes")
      complaints.require(local.areGuardsIntact, "round \(round) of seed \(seed) wrote beside")
    }

    private func move(
      _ generator: inout SeededRandom, _ request: (Int, Int) -> TransferRequest
    ) throws {
      var requests: [TransferRequest] = []
      var offset = 0
      while offset < share {
        let limit = 1 << Int.random(in: 0...18, using: &generator)
        let count = min(share - offset, Int.random(in: 1...limit, using: &generator))
        requests.append(request(offset, count))
        offset += count
      }
      requests.shuffle(using: &generator)
      let initiator = pair.initiator
      let batch = try initiator.start(requests)
      // All ways to wait for the end.
      if UInt8.random(in: 0...1, using: &generator) == 0 {
        while try !initiator.poll(batch).state.isTerminal { sched_yield() }
      }
      let status = try initiator.wait(batch, timeoutMilliseconds: 30_000)
      complaints.require(
        status.state == .completed && status.completedCount == UInt64(requests.count)
          && status.transferredBytes == UInt64(share),
        "\(status)")
      try initiator.freeBatch(batch)
    }
  }

  /// One-call transfers on several threads while others submit and poll.
  @Test(arguments: TransportKind.allCases)
  func synchronousTransfersBesideBatches(_ kind: TransportKind) throws {
    let memory = GuardedMemory(256 << 10)
    memory.fill(Pattern(seed: 2))
    try withPair(kind, registering: memory) { pair in
      let complaints = Complaints()
      try onThreads(4) { index in
        complaints.check("thread \(index)") {
          let local = GuardedMemory(64 << 10)
          for round in 0..<150 {
            let offset = (round * 4099 + index * 977) % (192 << 10)
            let request = pair.read(
              into: local.address, from: memory.address + offset, round % 8 == 0 ? 64 << 10 : 512)
            if index % 2 == 0 {
              try pair.initiator.transfer([request])
            } else {
              let batch = try pair.initiator.start([request])
              _ = try pair.initiator.wait(batch, timeoutMilliseconds: 20_000)
              try pair.initiator.freeBatch(batch)
            }
            let bytes = UnsafeRawBufferPointer(start: local.address, count: Int(request.length))
            complaints.require(
              Pattern(seed: 2).matches(bytes, at: offset), "thread \(index), round \(round)")
          }
        }
      }
      #expect(complaints.all.isEmpty, "\(complaints.all.prefix(5))")
    }
  }

  /// Both engines read from each other at once.
  @Test(arguments: TransportKind.allCases)
  func bothDirections(_ kind: TransportKind) throws {
    let memories = [GuardedMemory(8 << 20), GuardedMemory(8 << 20)]
    let engines = [try makeEngine(kind), try makeEngine(kind)]
    defer { for engine in engines { engine.close() } }
    for (index, engine) in engines.enumerated() {
      memories[index].fill(Pattern(seed: UInt8(index)))
      try engine.register(memories[index].address, length: 8 << 20, access: .remoteRead)
    }
    let complaints = Complaints()
    try onThreads(2) { index in
      complaints.check("engine \(index)") {
        let other = 1 - index
        let segment = try engines[index].openSegment(engines[other].name)
        let local = GuardedMemory(8 << 20)
        for _ in 0..<5 {
          local.fill(0)
          try engines[index].transfer([
            TransferRequest(
              opcode: .read, segment: segment, source: local.address,
              targetOffset: UInt64(UInt(bitPattern: memories[other].address)), length: 8 << 20)
          ])
          complaints.require(local.matches(Pattern(seed: UInt8(other))), "engine \(index)")
        }
      }
    }
    #expect(complaints.all.isEmpty, "\(complaints.all)")
  }

  /// Opening, using and closing one name from many threads.
  @Test(arguments: TransportKind.allCases)
  func openAndClose(_ kind: TransportKind) throws {
    let memory = GuardedMemory(4096)
    memory.fill(Pattern(seed: 8))
    try withPair(kind, registering: memory) { pair in
      let complaints = Complaints()
      try onThreads(4) { index in
        complaints.check("thread \(index)") {
          let local = GuardedMemory(4096)
          for _ in 0..<25 {
            let segment = try pair.initiator.openSegment(pair.target.name)
            var request = pair.read(into: local.address, from: memory.address, 4096)
            request.segment = segment
            try pair.initiator.transfer([request])
            complaints.require(local.matches(Pattern(seed: 8)), "thread \(index)")
            try pair.initiator.closeSegment(segment)
          }
        }
      }
      #expect(complaints.all.isEmpty, "\(complaints.all.prefix(5))")
      try pair.initiator.closeSegment(pair.segment)
      #expect(throws: MooncakeError.self) { _ = try pair.initiator.descriptor(of: pair.segment) }
    }
  }

  /// Many engines open the same one at once, and all succeed.
  @Test(arguments: TransportKind.allCases)
  func manyOpenersAtOnce(_ kind: TransportKind) throws {
    let memory = GuardedMemory(4096)
    memory.fill(Pattern(seed: 3))
    let target = try makeEngine(kind)
    defer { target.close() }
    try target.register(memory.address, length: 4096, access: .remoteRead)
    let address = UInt64(UInt(bitPattern: memory.address))
    let engines = try (0..<12).map { _ in try makeEngine(kind) { $0.ioThreads = 1 } }
    defer { for engine in engines { engine.close() } }
    let arrived = Atomic<Int>(0)
    let complaints = Complaints()
    try onThreads(engines.count) { index in
      complaints.check("engine \(index)") {
        arrived.add(1, ordering: .sequentiallyConsistent)
        while arrived.load(ordering: .sequentiallyConsistent) < engines.count { sched_yield() }
        let local = GuardedMemory(4096)
        let segment = try engines[index].openSegment(target.name)
        try engines[index].transfer([
          TransferRequest(
            opcode: .read, segment: segment, source: local.address, targetOffset: address,
            length: 4096)
        ])
        complaints.require(local.matches(Pattern(seed: 3)), "engine \(index)")
      }
    }
    #expect(complaints.all.isEmpty, "\(complaints.all.prefix(5))")
  }

  /// An engine's own segment is a target like any other.
  @Test(arguments: TransportKind.allCases)
  func ownSegment(_ kind: TransportKind) throws {
    let engine = try makeEngine(kind)
    defer { engine.close() }
    #expect(try engine.openSegment(engine.name) == 0)
    let memory = GuardedMemory(100_000)
    let local = GuardedMemory(100_000)
    local.fill(Pattern(seed: 4))
    let request = TransferRequest(
      opcode: .write, segment: 0, source: local.address,
      targetOffset: UInt64(UInt(bitPattern: memory.address)), length: 100_000)
    #expect(
      failureCode { () throws(MooncakeError) in try engine.transfer([request]) } == .notRegistered)
    try engine.register(memory.address, length: 100_000, access: .remoteWrite)
    try engine.transfer([request])
    #expect(memory.matches(Pattern(seed: 4)))
  }
}
