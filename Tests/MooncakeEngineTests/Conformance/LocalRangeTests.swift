import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// The local side of requests: they do not accidentally leave registered memory.
struct LocalRangeTests {
  private static let page = 4096

  /// A pair whose initiator has registered the second page of six, and the third and fourth as
  /// adjacent buffers.
  private static func withPages(
    _ kind: TransportKind, _ body: (EnginePair, GuardedMemory, GuardedMemory) throws -> Void
  ) throws {
    let remote = GuardedMemory(8 << 20)
    remote.fill(0xAB)
    let local = GuardedMemory(8 << 20)
    try withPair(kind, registering: remote) { pair in
      for index in [1, 2, 3] {
        try pair.initiator.register(
          local.address + index * page, length: UInt64(page), access: .local)
      }
      try body(pair, local, remote)
    }
  }

  /// The outcome for one range, by every way to submit.
  private static func outcomes(
    _ pair: EnginePair, _ request: TransferRequest
  ) -> [MooncakeError.Code?] {
    let engine = pair.initiator
    return [
      failureCode { () throws(MooncakeError) in try engine.transfer([request]) },
      failureCode { () throws(MooncakeError) in try engine.transfer([request, request]) },
      failureCode { () throws(MooncakeError) in
        let batch = try engine.start([request])
        let status = try engine.wait(batch, timeoutMilliseconds: 10_000)
        try engine.freeBatch(batch)
        if let error = status.error { throw MooncakeError(error, "") }
      },
      failureCode { () throws(MooncakeError) in
        let batch = try engine.createBatch(capacity: 1)
        try engine.submit(
          batch, [request], notification: Notification(name: "n", message: "m"))
        let status = try engine.wait(batch, timeoutMilliseconds: 10_000)
        try engine.freeBatch(batch)
        if let error = status.error { throw MooncakeError(error, "") }
      },
    ]
  }

  @Test(arguments: TransportKind.allCases)
  func whollyInsideOrWhollyOutside(_ kind: TransportKind) throws {
    try Self.withPages(kind) { pair, local, remote in
      func check(_ offset: Int, _ count: Int, _ expected: MooncakeError.Code?) {
        for opcode in [Opcode.read, .write] {
          local.fill(0xCD)
          remote.fill(0xAB)
          let request =
            opcode == .read
            ? pair.read(into: local.address + offset, from: remote.address, count)
            : pair.write(from: local.address + offset, to: remote.address, count)
          // Twice, so that the cached look-up answers as well.
          for _ in 0..<2 {
            for outcome in Self.outcomes(pair, request) {
              #expect(outcome == expected, "\(opcode) of \(count) bytes at \(offset)")
            }
          }
          if expected != nil {
            #expect(local.holdsOnly(0xCD) && remote.holdsOnly(0xAB), "\(count) bytes at \(offset)")
          }
        }
      }
      let page = Self.page
      check(page, page, nil)
      check(page + 100, 200, nil)
      // Adjacent buffers count as one.
      check(page, 3 * page, nil)
      check(2 * page - 1, 2, nil)
      // Not registered at all.
      check(0, page, nil)
      check(4 * page, page, nil)
      check(4 * page, 4 << 20, nil)
      // Out of a buffer, into one, and across all.
      check(3 * page, page + 1, .notRegistered)
      check(4 * page - 1, 2, .notRegistered)
      check(page, 4 << 20, .notRegistered)
      check(page - 1, 2, .notRegistered)
      check(0, page + 1, .notRegistered)
      check(0, 5 * page, .notRegistered)
      // No bytes, wherever they are.
      check(4 * page - 1, 0, nil)
      #expect(local.areGuardsIntact && remote.areGuardsIntact)
    }
  }

  @Test(arguments: TransportKind.allCases)
  func theMessageNamesBoth(_ kind: TransportKind) throws {
    try Self.withPages(kind) { pair, local, remote in
      let start = local.address + 3 * Self.page
      let good = pair.read(into: local.address, from: remote.address, 16)
      let bad = pair.read(into: start, from: remote.address, Self.page + 1)
      do throws(MooncakeError) {
        try pair.initiator.transfer([good, bad])
        Issue.record("it was accepted")
      } catch {
        let address = String(UInt(bitPattern: start), radix: 16)
        let end = String(UInt(bitPattern: start) + UInt(Self.page), radix: 16)
        #expect(error.code == .notRegistered)
        #expect(error.message.contains("request 1"))
        #expect(error.message.contains("[0x\(address), +\(Self.page + 1))"))
        #expect(error.message.contains("[0x\(address), +\(Self.page))"))
        #expect(error.message.contains("ends at 0x\(end)"))
      }
      // The call started nothing.
      #expect(local.holdsOnly(0))
    }
  }

  /// Cached look-ups do not outlive a change of the buffers.
  @Test(arguments: TransportKind.allCases)
  func changesAreSeen(_ kind: TransportKind) throws {
    try Self.withPages(kind) { pair, local, remote in
      let engine = pair.initiator
      let page = Self.page
      let request = pair.read(into: local.address + 3 * page, from: remote.address, 2 * page)
      func code() -> MooncakeError.Code? {
        failureCode { () throws(MooncakeError) in try engine.transfer([request]) }
      }
      for _ in 0..<3 {
        #expect(code() == .notRegistered)
        try engine.register(local.address + 4 * page, length: UInt64(page), access: .local)
        #expect(code() == nil)
        try engine.unregister(local.address + 3 * page)
        #expect(code() == .notRegistered)
        try engine.unregister(local.address + 4 * page)
        #expect(code() == nil)
        try engine.register(local.address + 3 * page, length: UInt64(page), access: .local)
      }
    }
  }

  /// Threads submit from memory that stays registered while other buffers come and go.
  @Test(arguments: TransportKind.allCases)
  func whileBuffersComeAndGo(_ kind: TransportKind) throws {
    try Self.withPages(kind) { pair, local, remote in
      let engine = pair.initiator
      let complaints = Complaints()
      let isDone = Atomic<Bool>(false)
      let page = Self.page
      let start = UInt(bitPattern: local.address)
      let changer = try WorkerThread.start(name: "changer") {
        for index in 0..<400 {
          let address = UnsafeMutableRawPointer(
            bitPattern: start + UInt((8 + index % 64) * page))!
          complaints.check("register") {
            try engine.register(address, length: UInt64(page), access: .remoteRead)
            try engine.unregister(address)
          }
        }
        isDone.store(true, ordering: .releasing)
      }
      let inside = pair.read(into: local.address + page, from: remote.address, 3 * page)
      let across = pair.read(into: local.address + 3 * page, from: remote.address, page + 1)
      while !isDone.load(ordering: .acquiring) {
        let codes = [inside, across].map { request in
          failureCode { () throws(MooncakeError) in try engine.transfer([request]) }
        }
        complaints.require(codes[0] == nil, "inside: \(String(describing: codes[0]))")
        complaints.require(codes[1] == .notRegistered, "across: \(String(describing: codes[1]))")
      }
      changer.join()
      #expect(complaints.all.isEmpty, "\(complaints.all.prefix(3))")
    }
  }
}
