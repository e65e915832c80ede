import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization
import Testing

/// Whether the target's memory is the engine's own, which is mapped, or ordinary, which the kernel
/// copies.
enum MemoryKind: CaseIterable, Sendable {
  case mapped, ordinary
}

extension TransferEngine {
  /// The path through shared memory to a segment.
  func sharedMemoryPath(of segment: SegmentID) throws -> SharedMemoryPath {
    try #require(
      try segments.segment(segment).route.paths.lazy.compactMap { $0 as? SharedMemoryPath }.first)
  }

  /// Bytes that went through shared memory.
  var sharedBytes: UInt64 {
    guard let counters = sharedMemory?.counters else { return 0 }
    return counters.readBytes.load(ordering: .relaxed)
      + counters.writtenBytes.load(ordering: .relaxed)
  }

  /// Bytes that went over TCP.
  var streamedBytes: UInt64 {
    guard let counters = tcp?.counters else { return 0 }
    return counters.readBytes.load(ordering: .relaxed)
      + counters.writtenBytes.load(ordering: .relaxed)
  }
}

/// Memory of one kind, registered with an engine.
final class RegisteredMemory: @unchecked Sendable {
  // Unchecked: tests order their accesses by transfers and joins.
  let address: UnsafeMutableRawPointer
  let count: Int
  private let ordinary: GuardedMemory?

  init(
    _ kind: MemoryKind, _ engine: TransferEngine, _ count: Int,
    access: Access = [.remoteRead, .remoteWrite]
  ) throws(MooncakeError) {
    self.count = count
    switch kind {
    case .mapped:
      ordinary = nil
      address = try engine.allocate(length: UInt64(count), access: access)
    case .ordinary:
      let memory = GuardedMemory(count)
      ordinary = memory
      address = memory.address
      try engine.register(address, length: UInt64(count), access: access)
    }
  }

  /// The first whole page.
  var pages: UnsafeMutableRawPointer { address.alignedUp(toMultipleOf: MemoryMapping.pageBytes) }

  var bytes: UnsafeMutableRawBufferPointer { .init(start: address, count: count) }

  func fill(_ byte: UInt8) { memset(address, Int32(byte), count) }

  func holdsOnly(_ byte: UInt8) -> Bool {
    address.load(as: UInt8.self) == byte && memcmp(address, address + 1, count - 1) == 0
  }
}

/// Bytes between engines of one host, by both ways of copying.
struct SharedMemoryTests {
  static let sizes = [1, 63, 64, 1023, 4096, 65_537, 600_000, (1 << 20) + 1, (5 << 20) + 12_345]

  @Test(arguments: MemoryKind.allCases, MemoryKind.allCases)
  func movesEveryByte(_ remoteKind: MemoryKind, _ localKind: MemoryKind) throws {
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    let count = Self.sizes.last! + 128
    let target = try RegisteredMemory(remoteKind, pair.target, count)
    let local = try RegisteredMemory(localKind, pair.initiator, count)
    var moved: UInt64 = 0
    for (round, size) in Self.sizes.enumerated() {
      // Unaligned on both sides: no way of copying may need alignment.
      let (here, there) = (round * 7 % 64, round * 13 % 64)
      let pattern = Pattern(seed: UInt8(round + 1))
      target.fill(0)
      local.fill(0)
      pattern.fill(.init(start: local.address + here, count: size))
      try pair.initiator.transfer([
        pair.write(from: local.address + here, to: target.address + there, size)
      ])
      #expect(pattern.matches(.init(start: target.address + there, count: size)), "\(size)")
      #expect(there == 0 || target.bytes[there - 1] == 0)
      #expect(target.bytes[there + size] == 0)
      local.fill(0)
      try pair.initiator.transfer([
        pair.read(into: local.address + here, from: target.address + there, size)
      ])
      #expect(pattern.matches(.init(start: local.address + here, count: size)), "\(size)")
      #expect(here == 0 || local.bytes[here - 1] == 0)
      #expect(local.bytes[here + size] == 0)
      moved += 2 * UInt64(size)
    }
    #expect(pair.initiator.sharedBytes == moved && pair.initiator.streamedBytes == 0)
  }

  /// More small blocks than fit one system call, with alternating opcodes.
  @Test(arguments: MemoryKind.allCases)
  func manyBlocks(_ kind: MemoryKind) throws {
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    let (count, size) = (700, 3000)
    let target = try RegisteredMemory(kind, pair.target, count * size)
    let local = GuardedMemory(count * size)
    let back = GuardedMemory(count * size)
    local.fill(Pattern(seed: 3))
    let order = (0..<count).map { $0 * 389 % count }
    var requests: [TransferRequest] = []
    for (place, index) in order.enumerated() {
      requests.append(
        pair.write(from: local.address + place * size, to: target.address + index * size, size))
      requests.append(
        pair.read(into: back.address + place * size, from: target.address + index * size, size))
    }
    for wave in [Array(requests.prefix(300)), Array(requests.dropFirst(300))] {
      let batch = try pair.initiator.start(wave)
      let status = try pair.initiator.wait(batch, timeoutMilliseconds: 10_000)
      #expect(status.state == .completed && status.completedCount == UInt64(wave.count))
      try pair.initiator.freeBatch(batch)
    }
    // Requests have no guaranteed order: a read may have seen the block before its write.
    try pair.initiator.transfer(requests.filter { $0.opcode == .read })
    #expect(back.matches(Pattern(seed: 3)) && back.areGuardsIntact)
    #expect(pair.initiator.streamedBytes == 0)
  }

  @Test func ownSegment() throws {
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    for kind in MemoryKind.allCases {
      let memory = try RegisteredMemory(kind, engine, 2 << 20)
      memory.fill(0x31)
      let local = GuardedMemory(2 << 20)
      for count in [4096, 2 << 20] {
        local.fill(0)
        try engine.transfer([
          TransferRequest(
            opcode: .read, segment: 0, source: local.address,
            targetOffset: UInt64(UInt(bitPattern: memory.address)), length: UInt64(count))
        ])
        #expect(memcmp(local.address, memory.address, count) == 0)
      }
    }
    #expect(engine.sharedBytes == 2 * ((2 << 20) + 4096) && engine.streamedBytes == 0)
  }

  @Test(arguments: [["tcp"], ["shm", "tcp"]], [["tcp"], ["shm", "tcp"]])
  func eitherSideSwitchesItOff(_ here: [String], _ there: [String]) throws {
    let target = try makeEngine { $0.transports = there }
    defer { target.close() }
    let engine = try makeEngine { $0.transports = here }
    defer { engine.close() }
    let memory = try RegisteredMemory(.mapped, target, 4096)
    let local = GuardedMemory(4096)
    memory.fill(0x32)
    let segment = try engine.openSegment(target.name)
    try engine.transfer([
      TransferRequest(
        opcode: .read, segment: segment, source: local.address,
        targetOffset: UInt64(UInt(bitPattern: memory.address)), length: 4096)
    ])
    #expect(local.holdsOnly(0x32))
    let isShared = here.count == 2 && there.count == 2
    #expect(engine.sharedBytes == (isShared ? 4096 : 0))
    #expect(engine.streamedBytes == (isShared ? 0 : 4096))
    #expect(
      engine.metrics().contains("shared_memory_requests_total") == here.contains("shm"))
  }

  /// A peer on another host, or one that falsely claims to share memory, is used over TCP.
  @Test func foreignDescriptors() throws {
    let engine = try makeEngine(.sharedMemory)
    defer { engine.close() }
    let transport = try #require(engine.sharedMemory)
    var descriptor = try engine.descriptor(of: 0)
    func connect(_ descriptor: SegmentDescriptor) -> SharedMemoryPeer? {
      let paths = try? transport.connect(
        to: descriptor, former: [], for: SegmentLink(descriptor.name, nil), deadline: .never)
      return (paths?.first as? SharedMemoryPath)?.peer
    }
    #expect(descriptor.hostIdentity == HostIdentity.current)
    #expect(connect(descriptor) === transport.own)
    descriptor.hostIdentity += "1"
    #expect(connect(descriptor) == nil)
    descriptor.hostIdentity = HostIdentity.current
    for name in ["", "mooncake-of-nobody", String(repeating: "x", count: 500)] {
      descriptor.sharedMemoryName = name
      #expect(connect(descriptor) == nil, "\(name)")
    }
  }

  @Test func rightsOfMappedMemory() throws {
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    let readable = try RegisteredMemory(.mapped, pair.target, 4096, access: .remoteRead)
    let writable = try RegisteredMemory(.mapped, pair.target, 4096, access: .remoteWrite)
    let hidden = try RegisteredMemory(.mapped, pair.target, 4096, access: .local)
    let local = GuardedMemory(4096)
    func attempt(_ opcode: Opcode, _ memory: RegisteredMemory) -> MooncakeError.Code? {
      let request =
        opcode == .read
        ? pair.read(into: local.address, from: memory.address, 4096)
        : pair.write(from: local.address, to: memory.address, 4096)
      return failureCode { () throws(MooncakeError) in try pair.initiator.transfer([request]) }
    }
    #expect(attempt(.read, readable) == nil && attempt(.write, writable) == nil)
    #expect(attempt(.write, readable) == .accessDenied)
    #expect(attempt(.read, writable) == .accessDenied)
    #expect(attempt(.read, hidden) == .notRegistered && attempt(.write, hidden) == .notRegistered)
    // The same memory with other rights.
    try pair.target.unregister(readable.address)
    #expect(attempt(.read, readable) == .notRegistered)
    try pair.target.register(readable.address, length: 4096, access: .remoteWrite)
    #expect(attempt(.write, readable) == nil)
    #expect(attempt(.read, readable) == .accessDenied)
    // Part of it, as a separate buffer.
    try pair.target.unregister(readable.address)
    try pair.target.register(readable.address + 1024, length: 1024, access: .remoteRead)
    let part = pair.read(into: local.address, from: readable.address + 1024, 1024)
    try pair.initiator.transfer([part])
    #expect(attempt(.read, readable) == .notRegistered)
    // Freeing memory ends what is registered inside it.
    try? pair.target.free(readable.address)
    #expect(
      failureCode { () throws(MooncakeError) in try pair.initiator.transfer([part]) }
        == .notRegistered)
    #expect(pair.initiator.streamedBytes == 0)
  }

  /// A request that exceeds its buffer moves nothing at all.
  @Test(arguments: MemoryKind.allCases, [3 << 20, 700_000])
  func rangesBeyondTheBuffer(_ kind: MemoryKind, _ count: Int) throws {
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    let target = try RegisteredMemory(kind, pair.target, count)
    target.fill(0x41)
    let local = GuardedMemory(count + 8)
    local.fill(0x42)
    let code = failureCode { () throws(MooncakeError) in
      try pair.initiator.transfer([pair.write(from: local.address, to: target.address, count + 8)])
    }
    #expect(code == .notRegistered)
    #expect(target.holdsOnly(0x41))
  }
}
