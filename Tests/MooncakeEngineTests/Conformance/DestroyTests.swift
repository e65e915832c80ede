import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Destroying an engine soon ends what it was doing and releases all memory.
struct DestroyTests {
  /// A peer that answers only when told to.
  private static func lazyPeer(_ isReleased: Box<Bool>) throws -> FakePeer {
    try FakePeer { connection in
      while let header = connection.header() {
        if header.opcode == .write { _ = connection.receive(Int(header.size)) }
        _ = eventually { isReleased.value }
        connection.sendStatus()
        if header.opcode == .read {
          connection.send([UInt8](repeating: 0xEE, count: Int(header.size)))
        }
      }
    }
  }

  @Test func transfersInFlight() throws {
    let isReleased = Box(false)
    let peer = try Self.lazyPeer(isReleased)
    defer { peer.stop() }
    let engine = try makeEngine()
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(4 << 20)
    var requests = [
      TransferRequest(
        opcode: .read, segment: segment, source: local.address,
        targetOffset: FakePeer.bufferAddress, length: 4 << 20)
    ]
    for index in 0..<500 {
      requests.append(
        TransferRequest(
          opcode: index % 2 == 0 ? .read : .write, segment: segment,
          source: local.address + index * 4096,
          targetOffset: FakePeer.bufferAddress + UInt64(index) * 4096, length: 4096))
    }
    let batch = try engine.start(requests)
    let callbackBatch = try engine.createBatch(capacity: 1)
    let callbackState = Box<TransferState?>(nil)
    try engine.setCallback(callbackBatch) { _, status in callbackState.value = status.state }
    try engine.submit(callbackBatch, [requests[1]])
    // One waiter of each kind.
    let waiterStates = Box<[TransferState]>([])
    let waiter = try WorkerThread.start(name: "waiter") {
      if let status = try? engine.wait(batch) { waiterStates.update { $0.append(status.state) } }
    }
    let code = Box<MooncakeError.Code?>(nil)
    let request = requests[1]
    let transferer = try startTransfer(engine, request, code)
    usleep(50_000)

    let milliseconds = elapsedMilliseconds { engine.close() }
    #expect(milliseconds < 3000)
    waiter.join()
    transferer.join()
    #expect(waiterStates.value == [.canceled])
    #expect(code.value == .canceled)
    #expect(callbackState.value == .canceled)
    let status = try engine.poll(batch)
    #expect(status.state == .canceled && status.terminalCount == UInt64(requests.count))

    local.fill(0xCC)
    isReleased.value = true
    usleep(100_000)
    #expect(local.holdsOnly(0xCC), "bytes landed after the engine was destroyed")
    try engine.freeBatch(batch)
    engine.close()
  }

  private func startTransfer(
    _ engine: TransferEngine, _ request: TransferRequest, _ code: Box<MooncakeError.Code?>
  ) throws -> WorkerThread {
    nonisolated(unsafe) let request = request
    return try WorkerThread.start(name: "transfer") {
      code.value = failureCode { () throws(MooncakeError) in try engine.transfer([request]) }
    }
  }

  /// A target is destroyed while peers read from it.
  @Test(arguments: TransportKind.allCases)
  func aTargetInUse(_ kind: TransportKind) throws {
    let memory = GuardedMemory(16 << 20)
    memory.fill(0x01)
    let pair = try EnginePair(kind) { target in
      try target.register(memory.address, length: 16 << 20, access: [.remoteRead, .remoteWrite])
    }
    defer { pair.close() }
    let complaints = Complaints()
    let completed = Atomic<Int>(0)
    let isWriting = [false, true]
    let threads = try isWriting.map { isWriting in
      try WorkerThread.start(name: "user") {
        let local = GuardedMemory(16 << 20)
        local.fill(0x01)
        let end = Deadline.after(milliseconds: 30_000)
        while !end.hasPassed {
          let request =
            isWriting
            ? pair.write(from: local.address, to: memory.address, 16 << 20)
            : pair.read(into: local.address, from: memory.address, 16 << 20)
          let code = failureCode { () throws(MooncakeError) in
            try pair.initiator.transfer([request], timeoutMilliseconds: 15_000)
          }
          complaints.require(local.holdsOnly(0x01), "foreign bytes arrived")
          completed.add(1, ordering: .relaxed)
          if let code {
            complaints.require(code == .unreachable, "the transfer failed with \(code)")
            return
          }
        }
        complaints.add("transfers go on without the target")
      }
    }
    #expect(eventually(within: 10_000) { completed.load(ordering: .relaxed) > 3 })
    let milliseconds = elapsedMilliseconds { pair.target.close() }
    #expect(milliseconds < 3000)
    memory.fill(0xEE)
    for thread in threads { thread.join() }
    #expect(complaints.all.isEmpty, "\(complaints.all)")
    #expect(memory.holdsOnly(0xEE), "a write landed in a destroyed engine's memory")
  }

  /// A peer that answers on neither port does not delay the end.
  @Test func callsToAStoppedPeer() throws {
    let peer = try PeerProcess.serving(byteCount: 4096)
    defer { peer.kill() }
    let engine = try makeEngine()
    let segment = try engine.openSegment(peer.name)
    peer.stop()
    let complaints = Complaints()
    let begun = Atomic<Int>(0)
    let calls = 3
    let threads = try (0..<calls).map { index in
      try WorkerThread.start(name: "caller") {
        begun.add(1, ordering: .relaxed)
        let code = failureCode { () throws(MooncakeError) in
          switch index {
          case 0: _ = try engine.openSegment(peer.name)
          case 1: try engine.probe(peer.name)
          default: try engine.notify(segment, Notification(name: "a", message: "b"))
          }
        }
        complaints.require(
          code == .canceled || code == .invalidHandle, "call \(index): \(String(describing: code))")
      }
    }
    // An unknown address makes the engine ask the peer again in the background.
    let local = GuardedMemory(64)
    let batch = try engine.start([
      TransferRequest(
        opcode: .read, segment: segment, source: local.address, targetOffset: 64, length: 64)
    ])
    #expect(eventually { begun.load(ordering: .relaxed) == calls })
    usleep(50_000)
    let milliseconds = elapsedMilliseconds {
      engine.close()
      for thread in threads { thread.join() }
    }
    #expect(milliseconds < 3000, "\(milliseconds) ms")
    #expect(try engine.poll(batch).state == .canceled)
    #expect(complaints.all.isEmpty, "\(complaints.all)")
  }

  /// A notification in flight to a peer that does not receive it.
  @Test func aNotificationOnItsWay() throws {
    let stopped = try PeerProcess.serving(byteCount: 4096)
    defer { stopped.kill() }
    let engine = try makeEngine()
    let target = try engine.openSegment(stopped.name)
    let local = GuardedMemory(64)
    let batch = try engine.createBatch(capacity: 1)
    stopped.stop()
    // The requests do not need the peer, so only the notification is left.
    try engine.submit(
      batch,
      [
        TransferRequest(
          opcode: .read, segment: target, source: local.address, targetOffset: 0, length: 0)
      ], notification: Notification(name: "n", message: "m"))
    usleep(50_000)
    #expect(try engine.poll(batch).state == .waiting)
    let milliseconds = elapsedMilliseconds { engine.close() }
    #expect(milliseconds < 3000, "\(milliseconds) ms")
    #expect(try engine.poll(batch).state.isTerminal)
  }

  /// Every call on a destroyed engine is an error; none traps.
  @Test func callsAfterwards() throws {
    let engine = try makeEngine()
    let batch = try engine.createBatch(capacity: 1)
    let memory = GuardedMemory(64)
    engine.close()
    func code(_ body: () throws(MooncakeError) -> Void) -> MooncakeError.Code? { failureCode(body) }
    #expect(
      code { () throws(MooncakeError) in
        try engine.register(memory.address, length: 64, access: .local)
      } == .invalidHandle)
    #expect(
      code { () throws(MooncakeError) in try engine.unregister(memory.address) } == .invalidHandle)
    #expect(
      code { () throws(MooncakeError) in _ = try engine.allocate(length: 64, access: .local) }
        == .invalidHandle)
    #expect(
      code { () throws(MooncakeError) in _ = try engine.openSegment("127.0.0.1:1") }
        == .invalidHandle)
    #expect(
      code { () throws(MooncakeError) in _ = try engine.createBatch(capacity: 1) } == .invalidHandle
    )
    let request = TransferRequest(
      opcode: .read, segment: 0, source: memory.address, targetOffset: 64, length: 64)
    #expect(
      code { () throws(MooncakeError) in try engine.submit(batch, [request]) } == .invalidHandle)
    #expect(code { () throws(MooncakeError) in try engine.transfer([request]) } == .invalidHandle)
    #expect(code { () throws(MooncakeError) in _ = try engine.eventDescriptor() } == .invalidHandle)
    #expect(engine.receiveNotification() == nil)
    #expect(!engine.metrics().isEmpty)
    try engine.freeBatch(batch)
  }

  /// Some threads submit, poll and open while another destroys.
  @Test(arguments: TransportKind.allCases)
  func racingUsers(_ kind: TransportKind) throws {
    let memory = GuardedMemory(1 << 20)
    for round in 0..<8 {
      let pair = try EnginePair(kind) { target in
        try target.register(memory.address, length: 1 << 20, access: .remoteRead)
      }
      defer { pair.close() }
      let engine = pair.initiator
      let complaints = Complaints()
      let threads = try (0..<3).map { index in
        try WorkerThread.start(name: "user\(index)") {
          let local = GuardedMemory(1 << 20)
          let count = index == 0 ? 1 << 20 : 512
          let request = pair.read(into: local.address, from: memory.address, count)
          while true {
            do throws(MooncakeError) {
              if index == 1 {
                try engine.transfer([request])
              } else {
                let batch = try engine.start([request])
                _ = try engine.wait(batch)
                try engine.freeBatch(batch)
              }
            } catch {
              complaints.require(
                error.code == .invalidHandle || error.code == .canceled, error.message)
              return
            }
            if engine.isClosing { return }
          }
        }
      }
      usleep(UInt32(3000 + round * 1000))
      let milliseconds = elapsedMilliseconds { engine.close() }
      #expect(milliseconds < 3000)
      for thread in threads { thread.join() }
      #expect(complaints.all.isEmpty, "\(complaints.all)")
    }
  }

  /// A slice that is retried after the loops have stopped ends instead of waiting forever.
  @Test func aSliceThatIsSentAgain() throws {
    let memory = GuardedMemory(4096)
    try withPair(.tcp, registering: memory) { pair in
      let engine = pair.initiator
      let segment = try engine.segments.segment(pair.segment)
      let local = GuardedMemory(4096)
      for closes in [false, true] {
        if closes { engine.close() }
        let batch = Batch(
          capacity: 1, pool: engine.router.pool, drivers: engine.drivers, announcer: nil)
        let first = try batch.beginSubmit(1)
        batch.prepare(
          first, segment: pair.segment,
          Slice(
            task: batch.tasks, local: local.address,
            remote: UInt64(UInt(bitPattern: memory.address)), length: 4096, deadline: .max,
            opcode: .read, isPooled: false))
        batch.publish(1, notification: nil)
        batch.endSubmit()
        engine.router.resubmit(segment, batch.slices)
        #expect(batch.sleep(until: .after(milliseconds: 5000)))
        #expect(batch.status.state == (closes ? .canceled : .completed))
        batch.waitUntilQuiet()
      }
    }
  }

  /// The peer restarts under its name while one-call transfers run and the engine ends.
  @Test(.timeLimit(.minutes(2)))
  func aPeerThatRestarts() throws {
    for round in 0..<6 {
      let first = try PeerProcess.serving(byteCount: 1 << 20)
      let port = UInt16(first.name.split(separator: ":").last ?? "") ?? 0
      let engine = try makeEngine { $0.connectionsPerPeer = 4 }
      let segment = try engine.openSegment(first.name)
      let address = first.address
      let isRunning = Atomic<Bool>(true)
      let callers = try (0..<3).map { index in
        try WorkerThread.start(name: "caller") {
          let local = GuardedMemory(1 << 20)
          while isRunning.load(ordering: .acquiring) {
            let count: UInt64 = index == 0 ? 1 << 20 : 100
            try? engine.transfer([
              TransferRequest(
                opcode: index == 1 ? .write : .read, segment: segment, source: local.address,
                targetOffset: address, length: count)
            ])
            if engine.isClosing { return }
          }
        }
      }
      usleep(20_000)
      first.kill()
      let second = try PeerProcess.serving(byteCount: 1 << 20, port: port)
      defer { second.kill() }
      // Varies from before the restart is known until after it.
      usleep(UInt32(round) * 40_000)
      let milliseconds = elapsedMilliseconds {
        engine.close()
        isRunning.store(false, ordering: .releasing)
        for caller in callers { caller.join() }
      }
      #expect(milliseconds < 3000, "round \(round): \(milliseconds) ms")
    }
  }

  /// 200 engines come and go; descriptors, threads and memory stay as they were.
  @Test func cyclesLeaveNothing() throws {
    let process = try PeerProcess(["cycles", "200"])
    let line = try process.readLine(within: 60_000)
    #expect(line == "ok")
    #expect(process.waitForExit(within: 5000) == 0)
  }
}
