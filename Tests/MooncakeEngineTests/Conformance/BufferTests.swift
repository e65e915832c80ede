import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Many buffers, access rights, and buffers that come and go.
struct BufferTests {
  @Test(arguments: TransportKind.allCases)
  func tenThousandBuffers(_ kind: TransportKind) throws {
    let count = 10_000
    let stride = 128
    let length = 96
    let target = GuardedMemory(count * stride)
    target.fill(Pattern(seed: 9))
    try withPair(kind) { pair in
      var ranges: [(address: UInt64, length: UInt64)] = []
      for index in 0..<count {
        let address = target.address + index * stride
        ranges.append((address: UInt64(UInt(bitPattern: address)), length: UInt64(length)))
      }
      try ranges.withUnsafeBufferPointer { ranges throws(MooncakeError) in
        try pair.target.register(ranges, location: "cpu:0", access: [.remoteRead, .remoteWrite])
      }
      var generator = SeededRandom(seed: 42)
      let picks = (0..<500).map { _ in Int.random(in: 0..<count, using: &generator) }
      let local = GuardedMemory(picks.count * length)
      let requests = picks.enumerated().map { place, pick in
        pair.read(
          into: local.address + place * length, from: target.address + pick * stride, length)
      }
      try pair.initiator.transfer(requests)
      for (place, pick) in picks.enumerated() {
        let bytes = UnsafeRawBufferPointer(start: local.address + place * length, count: length)
        #expect(Pattern(seed: 9).matches(bytes, at: pick * stride), "buffer \(pick)")
      }
      // Peers may not access what lies between two buffers.
      let gap = target.address + 77 * stride + length
      let code = failureCode { () throws(MooncakeError) in
        try pair.initiator.transfer([pair.read(into: local.address, from: gap, 1)])
      }
      #expect(code == .notRegistered)

      let addresses = ranges.map(\.address)
      try addresses.withUnsafeBufferPointer { addresses throws(MooncakeError) in
        try pair.target.unregister(addresses)
      }
      #expect(try pair.target.descriptor(of: 0).buffers.isEmpty)
    }
  }

  /// Registering one more buffer must not cost more, however many there are.
  @Test(arguments: TransportKind.allCases)
  func manyRegistrationsOneByOne(_ kind: TransportKind) throws {
    let engine = try makeEngine(kind)
    defer { engine.close() }
    let count = 2000
    let memory = GuardedMemory(count * 64)
    let milliseconds = try elapsedMilliseconds {
      for index in 0..<count {
        try engine.register(memory.address + index * 64, length: 32, access: .remoteRead)
      }
      for index in 0..<count { try engine.unregister(memory.address + index * 64) }
    }
    #expect(milliseconds < 20_000)
  }

  @Test(arguments: TransportKind.allCases)
  func scatteredPages(_ kind: TransportKind) throws {
    let page = 4096
    let count = 1024
    let target = GuardedMemory(2 * count * page)
    let source = GuardedMemory(count * page)
    source.fill(Pattern(seed: 1))
    try withPair(kind, registering: target) { pair in
      // Every other page, in neither ascending nor descending order.
      let order = (0..<count).map { $0 * 389 % count }
      try pair.initiator.transfer(
        order.map { index in
          pair.write(
            from: source.address + index * page, to: target.address + 2 * index * page, page)
        })
      for index in 0..<count {
        let bytes = UnsafeRawBufferPointer(start: target.address + 2 * index * page, count: page)
        #expect(Pattern(seed: 1).matches(bytes, at: index * page), "page \(index)")
        let between = target.address + (2 * index + 1) * page
        #expect(between.load(as: UInt64.self) == 0, "behind page \(index)")
      }
      let back = GuardedMemory(count * page)
      try pair.initiator.transfer(
        order.map { index in
          pair.read(
            into: back.address + index * page, from: target.address + 2 * index * page, page)
        })
      #expect(back.matches(Pattern(seed: 1)))
      #expect(back.areGuardsIntact && target.areGuardsIntact)
    }
  }

  @Test(arguments: TransportKind.allCases)
  func rights(_ kind: TransportKind) throws {
    let readable = GuardedMemory(4096)
    let writable = GuardedMemory(4096)
    let hidden = GuardedMemory(4096)
    try withPair(kind, registering: readable, access: .remoteRead) { pair in
      try pair.target.register(writable.address, length: 4096, access: .remoteWrite)
      try pair.target.register(hidden.address, length: 4096, access: .local)
      for memory in [readable, writable, hidden] { memory.fill(0x11) }
      let local = GuardedMemory(4096)
      func attempt(_ opcode: Opcode, _ memory: GuardedMemory) -> MooncakeError.Code? {
        local.fill(0x22)
        let request =
          opcode == .read
          ? pair.read(into: local.address, from: memory.address, 4096)
          : pair.write(from: local.address, to: memory.address, 4096)
        return failureCode { () throws(MooncakeError) in try pair.initiator.transfer([request]) }
      }
      #expect(attempt(.write, readable) == .accessDenied)
      #expect(attempt(.read, writable) == .accessDenied)
      #expect(local.holdsOnly(0x22))
      #expect(attempt(.write, hidden) == .notRegistered)
      #expect(attempt(.read, hidden) == .notRegistered)
      #expect(local.holdsOnly(0x22))
      for memory in [readable, writable, hidden] { #expect(memory.holdsOnly(0x11)) }

      #expect(attempt(.read, readable) == nil)
      #expect(local.holdsOnly(0x11))
      #expect(attempt(.write, writable) == nil)
      #expect(writable.holdsOnly(0x22))
    }
  }

  /// The engine asks the peer again about buffers missing from the descriptor.
  @Test(arguments: TransportKind.allCases)
  func registeredAfterOpen(_ kind: TransportKind) throws {
    let memory = GuardedMemory(70_000)
    memory.fill(Pattern(seed: 5))
    try withPair(kind) { pair in
      let local = GuardedMemory(70_000)
      let request = pair.read(into: local.address, from: memory.address, 70_000)
      #expect(
        failureCode { () throws(MooncakeError) in try pair.initiator.transfer([request]) }
          == .notRegistered)
      try pair.target.register(memory.address, length: 70_000, access: .remoteRead)
      try pair.initiator.transfer([request])
      #expect(local.matches(Pattern(seed: 5)))
      // Narrowed rights are noticed too.
      try pair.target.unregister(memory.address)
      try pair.target.register(memory.address, length: 70_000, access: .remoteWrite)
      #expect(
        failureCode { () throws(MooncakeError) in try pair.initiator.transfer([request]) }
          == .accessDenied)
    }
  }

  /// One bad request among good ones fails alone.
  @Test(arguments: TransportKind.allCases)
  func badAmongGood(_ kind: TransportKind) throws {
    let memory = GuardedMemory(64 << 10)
    memory.fill(Pattern(seed: 6))
    try withPair(kind, registering: memory, access: .remoteRead) { pair in
      let local = GuardedMemory(64 << 10)
      var requests = (0..<16).map { index in
        pair.read(into: local.address + index * 4096, from: memory.address + index * 4096, 4096)
      }
      requests[7].targetOffset = 4096
      requests[9].opcode = .write
      let batch = try pair.initiator.start(requests)
      let status = try pair.initiator.wait(batch, timeoutMilliseconds: 10_000)
      #expect(status.state == .failed && status.completedCount == 14 && status.terminalCount == 16)
      #expect(status.transferredBytes == 14 * 4096)
      for (index, one) in try pair.initiator.statuses(batch, count: 16).enumerated() {
        let expected: MooncakeError.Code? =
          index == 7 ? .notRegistered : index == 9 ? .accessDenied : nil
        #expect(one.error == expected, "request \(index)")
      }
      #expect(!pair.initiator.failureMessage(of: batch).isEmpty)
      try pair.initiator.freeBatch(batch)
      #expect(memory.matches(Pattern(seed: 6)))
    }
  }

  /// An unusable local buffer fails its own request and no other.
  @Test(arguments: TransportKind.allCases, [Opcode.read, .write])
  func unusableLocalMemory(_ kind: TransportKind, _ opcode: Opcode) throws {
    let memory = GuardedMemory(12_288)
    memory.fill(0x33)
    let hole = try MemoryMapping.anonymous(byteCount: 4096)
    mprotect(hole.address, 4096, PROT_NONE)
    let hollow = hole.address
    try withPair(kind, registering: memory) { pair in
      let local = GuardedMemory(12_288)
      local.fill(0x44)
      let places = [local.address, hollow, local.address + 8192]
      let batch = try pair.initiator.start(
        places.enumerated().map { index, place in
          let remote = memory.address + index * 4096
          return opcode == .read
            ? pair.read(into: place, from: remote, 4096)
            : pair.write(from: place, to: remote, 4096)
        })
      let status = try pair.initiator.wait(batch, timeoutMilliseconds: 10_000)
      #expect(status.state == .failed && status.terminalCount == 3)
      let statuses = try pair.initiator.statuses(batch, count: 3)
      #expect(statuses.map(\.error) == [nil, .invalidArgument, nil])
      try pair.initiator.freeBatch(batch)
      // The connection still works.
      try pair.initiator.transfer([pair.read(into: local.address, from: memory.address, 4096)])
    }
  }

  /// Registered memory that has vanished on the target is an error; both engines go on.
  @Test(arguments: TransportKind.allCases, [Opcode.read, .write])
  func unusableTargetMemory(_ kind: TransportKind, _ opcode: Opcode) throws {
    let memory = GuardedMemory(8192)
    let hole = try MemoryMapping.anonymous(byteCount: 1 << 20)
    mprotect(hole.address, 1 << 20, PROT_NONE)
    let hollow = hole.address
    try withPair(kind, registering: memory) { pair in
      try pair.target.register(hollow, length: 1 << 20, access: [.remoteRead, .remoteWrite])
      let local = GuardedMemory(1 << 20)
      for count in [8, 4096, 1 << 20] {
        let request =
          opcode == .read
          ? pair.read(into: local.address, from: hollow, count)
          : pair.write(from: local.address, to: hollow, count)
        #expect(
          failureCode { () throws(MooncakeError) in
            try pair.initiator.transfer([request], timeoutMilliseconds: 8000)
          } != nil, "\(count) bytes")
      }
      try pair.initiator.transfer([pair.read(into: local.address, from: memory.address, 8192)])
      #expect(local.areGuardsIntact)
      try pair.target.unregister(hollow)
    }
  }
}
