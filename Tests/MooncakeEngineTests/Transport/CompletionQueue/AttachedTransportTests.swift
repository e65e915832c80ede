import CompletionQueueTransport
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Transports that come to engines which work already.
struct AttachedTransportTests {
  private static let byteCount = 64 << 10

  /// Transfers over TCP until told to stop, without a failure.
  private func withTraffic(
    _ pair: EnginePair, _ memory: GuardedMemory, _ body: () throws -> Void
  ) throws {
    let isRunning = Atomic<Bool>(true)
    let count = Atomic<Int>(0)
    let complaints = Complaints()
    let thread = try WorkerThread.start(name: "traffic") {
      let local = GuardedMemory(Self.byteCount)
      while isRunning.load(ordering: .acquiring) {
        complaints.check("transfer") {
          try pair.initiator.transfer([
            pair.read(into: local.address, from: memory.address, Self.byteCount)
          ])
        }
        count.add(1, ordering: .relaxed)
      }
    }
    defer {
      isRunning.store(false, ordering: .releasing)
      thread.join()
      #expect(complaints.all.isEmpty, "\(complaints.all)")
    }
    _ = eventually { count.load(ordering: .relaxed) > 0 }
    try body()
    let seen = count.load(ordering: .relaxed)
    #expect(eventually { count.load(ordering: .relaxed) > seen + 2 })
  }

  @Test func whileTransfersRun() throws {
    let memory = GuardedMemory(Self.byteCount)
    memory.fill(Pattern(seed: 6))
    CQTransport.register
    try withPair(.tcp, registering: memory) { pair in
      try withTraffic(pair, memory) {
        try pair.target.attach("cq")
        try pair.initiator.attach("cq")
        // The known descriptor is older than the peer's new transport.
        #expect(try pair.initiator.openSegment(pair.target.name) == pair.segment)
      }
      let names = try pair.initiator.paths(to: pair.segment).map(\.transport)
      #expect(names == ["cq", "cq", "tcp"])
      let route = try pair.initiator.segments.segment(pair.segment).route
      let marks = route.paths.map(\.mark)
      #expect(Set(marks).count == 3, "\(marks)")
      let local = GuardedMemory(Self.byteCount)
      let read = pair.read(into: local.address, from: memory.address, Self.byteCount)
      #expect(try pair.initiator.move(read, avoiding: marks[2]).state == .completed)
      #expect(local.matches(Pattern(seed: 6)))
      #expect(
        try pair.initiator.completionQueue.totals.readBytes >= UInt64(Self.byteCount))
    }
  }

  /// There are fewer marks than paths in the life of a segment.
  @Test func marksInUseAreNotGivenAgain() throws {
    try withPair(.tcp) { pair in
      let segment = try pair.initiator.segments.segment(pair.segment)
      let used = try #require(segment.route.paths.first?.mark)
      let given = (0..<200).map { _ in segment.route.link.makeMark() }
      #expect(!given.contains(used) && Set(given).count == 63)
    }
  }

  /// The engine's own segment gets the new paths as well.
  @Test func ownSegment() throws {
    CQTransport.register
    let engine = try makeEngine(.tcp)
    defer { engine.close() }
    let memory = GuardedMemory(4096)
    memory.fill(0x31)
    try engine.register(memory.address, length: 4096, access: .remoteRead)
    try engine.attach("cq")
    let paths = try engine.segments.segment(0).route.paths
    #expect(paths.map(\.transportName) == ["cq", "cq", "tcp"])
    let local = GuardedMemory(4096)
    let request = TransferRequest(
      opcode: .read, segment: 0, source: local.address,
      targetOffset: UInt64(UInt(bitPattern: memory.address)), length: 4096)
    #expect(try engine.move(request, avoiding: paths[2].mark).state == .completed)
    #expect(local.holdsOnly(0x31))
    #expect(try engine.completionQueue.totals.readBytes == 4096)
  }

  /// What the devices give up goes on over TCP, although that was attached later.
  @Test func aWayForWhatFails() throws {
    let memory = GuardedMemory(Self.byteCount)
    memory.fill(Pattern(seed: 7))
    try withPair(.completionQueue, registering: memory) { pair in
      for engine in [pair.target, pair.initiator] { try engine.attach("tcp") }
      _ = try pair.initiator.openSegment(pair.target.name)
      #expect(try pair.initiator.paths(to: pair.segment).map(\.transport) == ["cq", "cq", "tcp"])
      let devices = try pair.initiator.completionQueue.verbs.devices
      for device in devices { device.isUp = false }
      let local = GuardedMemory(Self.byteCount)
      let read = pair.read(into: local.address, from: memory.address, Self.byteCount)
      let milliseconds = try elapsedMilliseconds { try pair.initiator.transfer([read]) }
      #expect(milliseconds < 3000 && local.matches(Pattern(seed: 7)))
      #expect(try pair.initiator.paths("tcp", to: pair.segment)[0].movedBytes > 0)
      for device in devices { device.isUp = true }
      #expect(
        eventually {
          try? pair.initiator.transfer([read])
          return devices[0].movedBytes > 0
        })
    }
  }

  @Test func aTransportThatDoesNotStart() throws {
    let isBroken = Box(true)
    TransportRegistry.add(
      MooncakeEngine.TransportKind("cq-frail") { context throws(MooncakeError) in
        if isBroken.value { throw MooncakeError(.system, "the firmware is too old") }
        return try CQTransport(context)
      })
    let memory = GuardedMemory(Self.byteCount)
    try withPair(.tcp, registering: memory) { pair in
      try withTraffic(pair, memory) {
        do throws(MooncakeError) {
          try pair.initiator.attach("cq-frail")
          Issue.record("it was attached")
        } catch {
          #expect(error.code == .system)
          #expect(error.message.contains("cq-frail"))
          #expect(error.message.contains("the firmware is too old"))
        }
        do throws(MooncakeError) {
          try pair.initiator.attach("nothing")
          Issue.record("it was attached")
        } catch {
          #expect(error.code == .unsupported && error.message.contains("nothing"))
        }
      }
      #expect(try pair.initiator.paths(to: pair.segment).map(\.transport) == ["tcp"])
      #expect(pair.initiator.transports.all.map(\.name) == ["tcp"])
      isBroken.value = false
      try pair.initiator.attach("cq-frail")
      #expect(pair.initiator.transports.all.count == 2)
    }
  }

  /// Without a metadata service the text must fit one message, keys included: the engine would be
  /// lost for its peers.
  @Test func keysThatDoNotFit() throws {
    CQTransport.register
    let count = 14_500
    let memory = GuardedMemory(count * 64)
    memory.fill(0x41)
    let ranges = (0..<count).map {
      (address: UInt64(UInt(bitPattern: memory.address)) + UInt64($0 * 64), length: UInt64(32))
    }
    let register: (TransferEngine) throws -> Void = { target in
      try ranges.withUnsafeBufferPointer { ranges throws(MooncakeError) in
        try target.register(ranges, location: "*", access: [.remoteRead, .remoteWrite])
      }
    }
    let pair = try EnginePair(.tcp, register: register)
    defer { pair.close() }
    do throws(MooncakeError) {
      try pair.target.attach("cq")
      Issue.record("it was attached")
    } catch {
      #expect(error.code == .full)
      #expect(error.message.contains("transport 'cq' is not attached"), "\(error.message)")
    }
    #expect(pair.target.transports.all.map(\.name) == ["tcp"])
    #expect(try pair.initiator.openSegment(pair.target.name) == pair.segment)
    let local = GuardedMemory(32)
    try pair.initiator.transfer([pair.read(into: local.address, from: memory.address, 32)])
    #expect(local.holdsOnly(0x41))
    let rest = ranges.dropFirst().map(\.address)
    try rest.withUnsafeBufferPointer { rest throws(MooncakeError) in
      try pair.target.unregister(rest)
    }
    try pair.target.attach("cq")
    #expect(pair.target.transports.all.map(\.name) == ["cq", "tcp"])
  }

  /// Counts how often it is told of registrations.
  private final class Recorder: Transport, Sendable {
    static let whilePublishing = Box<(@Sendable () -> Void)?>(nil)
    let publications = Atomic<Int>(0)
    let revocations = Atomic<Int>(0)

    var name: String { "recorder" }
    var totals: TransportTotals { TransportTotals() }
    var metrics: [TransportCounter] { [] }
    func describe(in descriptor: inout SegmentDescriptor) {}
    func connect(
      to descriptor: SegmentDescriptor, former: [any Path], for link: SegmentLink,
      deadline: Deadline
    ) throws(MooncakeError) -> [any Path] {
      throw MooncakeError(.unsupported, "it leads nowhere")
    }
    func offer(_ new: [BufferTable.Buffer]) {
      if publications.wrappingAdd(1, ordering: .relaxed).oldValue == 0 {
        Self.whilePublishing.value?()
      }
    }
    func revoke(_ buffers: [BufferTable.Buffer], until call: Call) -> String? {
      revocations.wrappingAdd(1, ordering: .relaxed)
      return nil
    }
    func stop(until deadline: Deadline) -> String? { nil }
  }

  /// A buffer that comes or goes in the middle of an attach is no secret to the transport.
  @Test func registrationsMeanwhile() throws {
    TransportRegistry.add(
      MooncakeEngine.TransportKind("recorder") { _ throws(MooncakeError) in Recorder() })
    let engine = try makeEngine(.tcp)
    defer { engine.close() }
    let memory = GuardedMemory(8192)
    try engine.register(memory.address, length: 4096, access: .remoteRead)
    Recorder.whilePublishing.value = {
      try? engine.register(memory.address + 4096, length: 4096, access: .remoteRead)
      try? engine.unregister(memory.address)
    }
    defer { Recorder.whilePublishing.value = nil }
    try engine.attach("recorder")
    let recorder = try #require(
      engine.transports.all.lazy.compactMap { $0 as? Recorder }.first)
    #expect(recorder.publications.load(ordering: .relaxed) == 2)
    #expect(recorder.revocations.load(ordering: .relaxed) == 1)
  }

  @Test func nothingInCommon() throws {
    CQTransport.register
    let target = try makeEngine(.tcp) { $0.transports = ["shm"] }
    defer { target.close() }
    let initiator = try makeEngine(.tcp) { $0.transports = ["cq", "tcp"] }
    defer { initiator.close() }
    do throws(MooncakeError) {
      _ = try initiator.openSegment(target.name)
      Issue.record("it was opened")
    } catch {
      #expect(error.code == .unsupported)
      #expect(error.message.contains(target.name))
      #expect(error.message.contains("cq: the peer has no completion queues"))
      #expect(error.message.contains("tcp: the peer serves 'shm' and no TCP"), "\(error.message)")
    }
  }
}
