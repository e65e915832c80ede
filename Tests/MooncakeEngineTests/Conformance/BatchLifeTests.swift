import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// A batch as callers see it: counts, waiting, descriptors, callbacks, ids.
struct BatchLifeTests {
  private static func withMemory(
    _ kind: TransportKind, _ body: (EnginePair, GuardedMemory, TransferRequest) throws -> Void
  ) throws {
    let memory = GuardedMemory(64 << 10)
    try withPair(kind, registering: memory) { pair in
      let local = GuardedMemory(64 << 10)
      try body(pair, local, pair.read(into: local.address, from: memory.address, 4096))
    }
  }

  @Test(arguments: TransportKind.allCases)
  func countsAcrossSubmits(_ kind: TransportKind) throws {
    try Self.withMemory(kind) { pair, _, request in
      let engine = pair.initiator
      let batch = try engine.createBatch(capacity: 10)
      let empty = try engine.poll(batch)
      #expect(empty.submittedCount == 0 && empty.terminalCount == 0)
      try engine.submit(batch, [request, request])
      try engine.submit(batch, [request])
      let status = try engine.wait(batch, timeoutMilliseconds: 5000)
      #expect(status.state == .completed && status.error == nil)
      #expect(status.submittedCount == 3 && status.completedCount == 3)
      #expect(status.terminalCount == 3 && status.transferredBytes == 3 * 4096)
      let one = try engine.poll(batch, request: 2)
      #expect(one.state == .completed && one.error == nil && one.transferredBytes == 4096)
      for index in [3, -1, 10, Int.max] {
        #expect(
          failureCode { () throws(MooncakeError) in _ = try engine.poll(batch, request: index) }
            == .invalidArgument)
      }
      // A finished batch takes more requests.
      try engine.submit(batch, [request])
      #expect(try engine.wait(batch, timeoutMilliseconds: 5000).completedCount == 4)
      try engine.freeBatch(batch)
    }
  }

  @Test(arguments: TransportKind.allCases)
  func capacity(_ kind: TransportKind) throws {
    try Self.withMemory(kind) { pair, _, request in
      let engine = pair.initiator
      for capacity in [0, -1, TransferEngine.batchCapacityLimit + 1, Int.max] {
        #expect(
          failureCode { () throws(MooncakeError) in _ = try engine.createBatch(capacity: capacity) }
            == .invalidArgument)
      }
      let batch = try engine.createBatch(capacity: 2)
      func submit(_ count: Int) -> MooncakeError.Code? {
        failureCode { () throws(MooncakeError) in
          try engine.submit(batch, [TransferRequest](repeating: request, count: count))
        }
      }
      #expect(submit(3) == .full)
      #expect(try engine.poll(batch).submittedCount == 0)
      #expect(submit(1) == nil)
      #expect(submit(2) == .full)
      #expect(submit(1) == nil)
      #expect(submit(1) == .full)
      #expect(try engine.wait(batch, timeoutMilliseconds: 5000).completedCount == 2)
      try engine.freeBatch(batch)
    }
  }

  /// One bad request refuses the whole submit, before any byte moves.
  @Test(arguments: TransportKind.allCases)
  func submitIsAllOrNothing(_ kind: TransportKind) throws {
    try Self.withMemory(kind) { pair, local, request in
      let engine = pair.initiator
      local.fill(0xCC)
      var bad: [(TransferRequest, MooncakeError.Code)] = []
      var change = request
      change.segment = 4711
      bad.append((change, .invalidHandle))
      change.segment = -1
      bad.append((change, .invalidHandle))
      change = request
      change.source = nil
      bad.append((change, .invalidArgument))
      change = request
      change.length = .max
      bad.append((change, .invalidArgument))
      change = request
      change.targetOffset = .max - 1
      bad.append((change, .invalidArgument))
      change = request
      change.source = UnsafeMutableRawPointer(bitPattern: UInt.max - 10)
      bad.append((change, .invalidArgument))
      let batch = try engine.createBatch(capacity: 8)
      for (request, expected) in bad {
        let code = failureCode { () throws(MooncakeError) in
          try engine.submit(
            batch, [pair.read(into: local.address, from: local.address, 0), request])
        }
        #expect(code == expected, "\(request)")
      }
      let raw = RawRequest(opcode: 2, segment: pair.segment, source: 8, targetOffset: 8, length: 8)
      #expect(
        failureCode { () throws(MooncakeError) in
          try engine.submit(batch, count: 1, timeoutMilliseconds: 0, notification: nil) { _ in raw }
        } == .invalidArgument)
      #expect(try engine.poll(batch).submittedCount == 0)
      #expect(local.holdsOnly(0xCC))
      try engine.freeBatch(batch)
    }
  }

  /// A length that no buffer can have is an error and never overflows.
  @Test(arguments: TransportKind.allCases)
  func absurdLengths(_ kind: TransportKind) throws {
    try Self.withMemory(kind) { pair, local, request in
      for length in [UInt64(1) << 47, 1 << 62, UInt64(Int.max), UInt64(Int.max) + 1, .max] {
        for opcode in [Opcode.read, .write] {
          var change = request
          change.length = length
          change.opcode = opcode
          #expect(
            failureCode { () throws(MooncakeError) in try pair.initiator.transfer([change]) } != nil
          )
        }
      }
      #expect(local.areGuardsIntact)
    }
  }

  @Test func waitAndFreeWhileRunning() throws {
    let peer = try FakePeer { $0.awaitClose() }
    defer { peer.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(64)
    let batch = try engine.start([
      TransferRequest(
        opcode: .read, segment: segment, source: local.address,
        targetOffset: FakePeer.bufferAddress, length: 64)
    ])
    let milliseconds = elapsedMilliseconds {
      #expect(
        failureCode { () throws(MooncakeError) in
          _ = try engine.wait(batch, timeoutMilliseconds: 100)
        }
          == .timeout)
    }
    #expect((80..<1000).contains(milliseconds))
    let running = try engine.poll(batch)
    #expect(running.state == .waiting && running.error == nil && running.terminalCount == 0)
    #expect(failureCode { () throws(MooncakeError) in try engine.freeBatch(batch) } == .busy)
    #expect(
      failureCode { () throws(MooncakeError) in try engine.setCallback(batch) { _, _ in } } == .busy
    )
    try engine.cancel(batch)
    #expect(try engine.wait(batch, timeoutMilliseconds: 2000).state == .canceled)
    try engine.freeBatch(batch)
  }

  /// A caller that has polled every request to its end may free the batch at once.
  @Test(arguments: TransportKind.allCases)
  func freedAsSoonAsPolled(_ kind: TransportKind) throws {
    let remote = GuardedMemory(4 << 20)
    try withPair(kind, registering: remote) { pair in
      let engine = pair.initiator
      let local = GuardedMemory(4 << 20)
      // The larger ones are copied by the engine's threads.
      for (rounds, count) in [(1000, 64), (100, 1 << 20)] {
        let requests = (0..<2).map {
          pair.read(into: local.address + $0 * count, from: remote.address + $0 * count, count)
        }
        for round in 0..<rounds {
          let batch = try engine.start(requests)
          for index in 0..<2 {
            while try engine.poll(batch, request: index).state == .waiting {}
          }
          if round % 2 == 0 { #expect(try engine.poll(batch).state == .completed) }
          try engine.freeBatch(batch)
        }
      }
    }
  }

  @Test(arguments: TransportKind.allCases)
  func staleIDs(_ kind: TransportKind) throws {
    try Self.withMemory(kind) { pair, _, request in
      let engine = pair.initiator
      let old = try engine.createBatch(capacity: 1)
      try engine.freeBatch(old)
      let new = try engine.createBatch(capacity: 1)
      #expect(old != new)
      for id in [old, 0, 1 << 63, .max, new &+ 1] {
        func refuses(_ body: () throws(MooncakeError) -> Void) -> Bool {
          failureCode(body) == .invalidHandle
        }
        #expect(refuses { () throws(MooncakeError) in try engine.submit(id, [request]) })
        #expect(refuses { () throws(MooncakeError) in _ = try engine.poll(id) })
        #expect(refuses { () throws(MooncakeError) in _ = try engine.poll(id, request: 0) })
        #expect(refuses { () throws(MooncakeError) in _ = try engine.wait(id) })
        #expect(refuses { () throws(MooncakeError) in try engine.cancel(id) })
        #expect(refuses { () throws(MooncakeError) in try engine.freeBatch(id) })
        #expect(refuses { () throws(MooncakeError) in _ = try engine.eventDescriptor(of: id) })
        #expect(refuses { () throws(MooncakeError) in try engine.setCallback(id) { _, _ in } })
      }
      try engine.freeBatch(new)
    }
  }

  // MARK: - Descriptors and callbacks

  @Test(arguments: TransportKind.allCases)
  func eventDescriptorOfABatch(_ kind: TransportKind) throws {
    try Self.withMemory(kind) { pair, _, request in
      let engine = pair.initiator
      let batch = try engine.createBatch(capacity: 20)
      let descriptor = try engine.eventDescriptor(of: batch)
      #expect(try engine.eventDescriptor(of: batch) == descriptor)
      #expect(!isReadable(descriptor, within: 0))
      for _ in 0..<5 {
        try engine.submit(batch, [request, request])
        #expect(isReadable(descriptor, within: 5000))
        #expect(try engine.poll(batch).state == .completed)
        #expect(isReadable(descriptor, within: 0), "readable as long as it is terminal")
      }
      // The descriptor is requested only afterwards.
      let late = try engine.start([request])
      _ = try engine.wait(late, timeoutMilliseconds: 5000)
      #expect(isReadable(try engine.eventDescriptor(of: late), within: 100))
      try engine.freeBatch(late)
      try engine.freeBatch(batch)
    }
  }

  @Test func eventDescriptorWhileRunning() throws {
    let isReleased = Box(false)
    let peer = try FakePeer { connection in
      while let header = connection.header() {
        _ = eventually { isReleased.value }
        connection.sendStatus()
        connection.send([UInt8](repeating: 1, count: Int(header.size)))
      }
    }
    defer { peer.stop() }
    let engine = try makeEngine()
    defer { engine.close() }
    let segment = try engine.openSegment(peer.name)
    let local = GuardedMemory(64)
    let request = TransferRequest(
      opcode: .read, segment: segment, source: local.address,
      targetOffset: FakePeer.bufferAddress, length: 64)
    let batch = try engine.createBatch(capacity: 2)
    let descriptor = try engine.eventDescriptor(of: batch)
    try engine.submit(batch, [request])
    #expect(!isReadable(descriptor, within: 50))
    isReleased.value = true
    #expect(isReadable(descriptor, within: 5000))
    isReleased.value = false
    try engine.submit(batch, [request])
    #expect(!isReadable(descriptor, within: 50), "another submit takes the event back")
    isReleased.value = true
    #expect(isReadable(descriptor, within: 5000))
    try engine.freeBatch(batch)
  }

  @Test(arguments: TransportKind.allCases)
  func eventDescriptorOfTheEngine(_ kind: TransportKind) throws {
    try Self.withMemory(kind) { pair, _, request in
      let engine = pair.initiator
      let descriptor = try engine.eventDescriptor()
      #expect(try engine.eventDescriptor() == descriptor)
      #expect(!isReadable(descriptor, within: 0))
      var endCount: UInt64 = 0
      var batches: [BatchID] = []
      for _ in 0..<10 { batches.append(try engine.start([request])) }
      while endCount < 10, isReadable(descriptor, within: 5000) {
        var count: UInt64 = 0
        if Glibc.read(descriptor, &count, 8) == 8 { endCount += count }
      }
      #expect(endCount == 10)
      for batch in batches {
        #expect(try engine.poll(batch).state == .completed)
        try engine.freeBatch(batch)
      }
    }
  }

  @Test(arguments: TransportKind.allCases)
  func callbacksRunOnce(_ kind: TransportKind) throws {
    try Self.withMemory(kind) { pair, _, request in
      let engine = pair.initiator
      let calls = Box<[BatchID: Int]>([:])
      let complaints = Complaints()
      var batches: [BatchID] = []
      for _ in 0..<50 {
        let batch = try engine.createBatch(capacity: 3)
        try engine.setCallback(batch) { id, status in
          calls.update { $0[id, default: 0] += 1 }
          complaints.require(status.state == .completed && status.completedCount == 3, "\(status)")
          // Freeing inside the callback is allowed.
          complaints.check("free") { try engine.freeBatch(id) }
        }
        batches.append(batch)
      }
      for batch in batches { try engine.submit(batch, [request, request, request]) }
      #expect(eventually { calls.value.count == 50 })
      usleep(20_000)
      #expect(calls.value.values.allSatisfy { $0 == 1 })
      #expect(eventually { batches.allSatisfy { (try? engine.poll($0)) == nil } })
      #expect(complaints.all.isEmpty, "\(complaints.all)")
    }
  }

  /// A slow callback delays neither transfers nor their waiters.
  @Test(arguments: TransportKind.allCases)
  func slowCallback(_ kind: TransportKind) throws {
    try Self.withMemory(kind) { pair, _, request in
      let engine = pair.initiator
      let isReleased = Box(false)
      let batch = try engine.createBatch(capacity: 1)
      try engine.setCallback(batch) { _, _ in _ = eventually { isReleased.value } }
      try engine.submit(batch, [request])
      #expect(try engine.wait(batch, timeoutMilliseconds: 2000).state == .completed)
      let milliseconds = try elapsedMilliseconds {
        for _ in 0..<20 { try engine.transfer([request]) }
      }
      #expect(milliseconds < 2000)
      isReleased.value = true
      try engine.freeBatch(batch)
    }
  }

  // MARK: - Notifications

  /// Submits with overlapping notifications: each is delivered only after its own requests.
  @Test(arguments: TransportKind.allCases)
  func overlappingNotifications(_ kind: TransportKind) throws {
    let remote = GuardedMemory(4096)
    try withPair(kind, registering: remote) { pair in
      let engine = pair.initiator
      let count = 200
      let batch = try engine.createBatch(capacity: count)
      let local = GuardedMemory(4096)
      for index in 0..<count {
        local.address.storeBytes(of: UInt64(index + 1), as: UInt64.self)
        try engine.submit(
          batch, [pair.write(from: local.address, to: remote.address, 8)],
          notification: Notification(name: "n", message: String(index + 1)))
        // The written value is there before its notification, and no later one has been delivered.
        while try engine.poll(batch, request: index).state == .waiting {
          let written = remote.address.load(as: UInt64.self)
          if let told = pair.target.receiveNotification() {
            #expect(UInt64(told.message)! <= max(written, remote.address.load(as: UInt64.self)))
          }
          if index % 3 != 0 && written == UInt64(index + 1) { break }
        }
      }
      let status = try engine.wait(batch, timeoutMilliseconds: 20_000)
      #expect(status.state == .completed && status.completedCount == UInt64(count))
      try engine.freeBatch(batch)
    }
  }

  @Test(arguments: TransportKind.allCases)
  func notificationWithABatch(_ kind: TransportKind) throws {
    try Self.withMemory(kind) { pair, _, request in
      let engine = pair.initiator
      let sent = Notification(name: "shard", message: "7 \u{1F680} \"quoted\"\n")
      let batch = try engine.createBatch(capacity: 8)
      try engine.submit(batch, [request, request], notification: sent)
      #expect(try engine.wait(batch, timeoutMilliseconds: 5000).state == .completed)
      // Terminal means that the peer has it.
      #expect(pair.target.receiveNotification() == sent)
      #expect(pair.target.receiveNotification() == nil)
      // A failed batch sends no notification.
      var bad = request
      bad.targetOffset = 64
      try engine.submit(batch, [request, bad], notification: sent)
      #expect(try engine.wait(batch, timeoutMilliseconds: 5000).state == .failed)
      #expect(pair.target.receiveNotification() == nil)
      try engine.freeBatch(batch)

      try engine.notify(pair.segment, sent)
      #expect(pair.target.receiveNotification() == sent)
      let huge = Notification(
        name: "", message: String(repeating: "x", count: Notification.byteLimit + 1))
      #expect(
        failureCode { () throws(MooncakeError) in try engine.notify(pair.segment, huge) }
          == .invalidArgument)
    }
  }
}

/// Whether a descriptor is readable within some milliseconds.
func isReadable(_ descriptor: Int32, within milliseconds: Int32) -> Bool {
  var item = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
  return poll(&item, 1, milliseconds) == 1
}
