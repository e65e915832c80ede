import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Every size arrives intact in both directions and changes nothing else.
struct SizeTests {
  static let sizes = [
    1, 2, 7, 23, 24, 25, 333, 4095, 4096, 4097, 65_535, 65_536, 65_537, (1 << 20) - 1, 1 << 20,
    (1 << 20) + 1, (2 << 20) + 3, 16 << 20,
  ]

  @Test(arguments: TransportKind.allCases)
  func readAndWrite(_ kind: TransportKind) throws {
    let largest = Self.sizes.max()!
    let target = GuardedMemory(largest, alignment: 3)
    try withPair(kind, registering: target) { pair in
      for (number, size) in Self.sizes.enumerated() {
        let source = Pattern(seed: UInt8(number))
        let local = GuardedMemory(size, alignment: number % 5)
        local.fill(source)
        target.fill(0)
        let place = target.address + (largest - size)
        try pair.initiator.transfer([pair.write(from: local.address, to: place, size)])
        #expect(source.matches(.init(start: place, count: size)), "\(size) bytes written")
        let before = UnsafeRawBufferPointer(start: target.address, count: largest - size)
        #expect(before.prefix(4096).allSatisfy { $0 == 0 }, "\(size) bytes: before the target")
        #expect(before.suffix(4096).allSatisfy { $0 == 0 }, "\(size) bytes: before the target")

        let destination = GuardedMemory(size, alignment: 5 - number % 5)
        try pair.initiator.transfer([pair.read(into: destination.address, from: place, size)])
        #expect(destination.matches(source), "\(size) bytes read")
        #expect(destination.areGuardsIntact && local.areGuardsIntact, "\(size) bytes: guards")
      }
      #expect(target.areGuardsIntact)
    }
  }

  /// A request of no bytes completes, wherever it points.
  @Test(arguments: TransportKind.allCases)
  func nothing(_ kind: TransportKind) throws {
    let target = GuardedMemory(64)
    try withPair(kind, registering: target) { pair in
      let requests = [
        pair.read(into: nil, from: target.address, 0), pair.write(from: nil, to: target.address, 0),
        TransferRequest(
          opcode: .read, segment: pair.segment, source: nil, targetOffset: 0, length: 0),
      ]
      let batch = try pair.initiator.start(requests)
      let status = try pair.initiator.wait(batch, timeoutMilliseconds: 5000)
      #expect(status.state == .completed && status.completedCount == 3)
      #expect(status.transferredBytes == 0)
      try pair.initiator.freeBatch(batch)
    }
  }

  /// A range across two buffers takes two requests.
  @Test(arguments: TransportKind.allCases)
  func edgesOfABuffer(_ kind: TransportKind) throws {
    let target = GuardedMemory(8192)
    target.fill(Pattern(seed: 3))
    try withPair(kind) { pair in
      let registered = target.address
      try pair.target.register(registered, length: 4096, access: [.remoteRead])
      try pair.target.register(registered + 4096, length: 4096, access: [.remoteRead])
      let local = GuardedMemory(4096)
      for offset in [0, 4095, 4096, 8191] {
        try pair.initiator.transfer([pair.read(into: local.address, from: registered + offset, 1)])
        #expect(
          local.bytes[0] == (registered + offset).load(as: UInt8.self), "byte \(offset)")
      }
      for (offset, count) in [(4095, 2), (0, 4097), (8191, 2), (8192, 1), (-1, 1), (-1, 2)] {
        local.fill(0xCC)
        let code = failureCode { () throws(MooncakeError) in
          try pair.initiator.transfer(
            [pair.read(into: local.address, from: registered + offset, count)])
        }
        #expect(code == .notRegistered, "\(count) bytes at \(offset)")
        #expect(local.holdsOnly(0xCC), "\(count) bytes at \(offset)")
      }
    }
  }

  /// More bytes than 32 bits can count, in ranges that take only a few megabytes of memory.
  @Test(
    .disabled(
      if: Sanitizer.isThread, "the thread sanitizer keeps several bytes for each byte touched"),
    arguments: TransportKind.allCases)
  func moreThan4GiB(_ kind: TransportKind) throws {
    let count = (4 << 30) + 12_345
    let marks = [0, 1 << 20, (4 << 30) - 4096, 4 << 30, (4 << 30) + 8192]
    // Untouched private memory reads as zeros; only the marked pages exist.
    let source = try SparseMemory(count, aliased: false, ownPages: [])
    // Everything between the marks lands in one small file that is mapped repeatedly.
    let sink = try SparseMemory(count, aliased: true, ownPages: marks)
    for (number, mark) in marks.enumerated() {
      Pattern(seed: UInt8(number)).fill(.init(start: source.address + mark, count: 4096))
    }
    let last = source.address + (count - 1)
    last.storeBytes(of: 0xEE, as: UInt8.self)

    try withPair(kind) { pair in
      try pair.target.register(source.address, length: UInt64(count), access: .remoteRead)
      let batch = try pair.initiator.start([
        pair.read(into: sink.address, from: source.address, count)
      ])
      let status = try pair.initiator.wait(batch, timeoutMilliseconds: 60_000)
      #expect(status.state == .completed && status.transferredBytes == UInt64(count))
      try pair.initiator.freeBatch(batch)
    }
    for (number, mark) in marks.enumerated() {
      let page = UnsafeRawBufferPointer(start: sink.address + mark, count: 4096)
      #expect(Pattern(seed: UInt8(number)).matches(page), "at \(mark)")
    }
    #expect((sink.address + (count - 1)).load(as: UInt8.self) == 0xEE)
    #expect((sink.address + count).load(as: UInt8.self) == 0)
  }
}

/// A huge range of addresses with little memory behind it.
private final class SparseMemory {
  private let mapping: MemoryMapping
  private static let fileBytes = 64 << 20

  var address: UnsafeMutableRawPointer { mapping.address }

  init(_ count: Int, aliased: Bool, ownPages: [Int]) throws {
    let size = (count + Self.fileBytes) / Self.fileBytes * Self.fileBytes
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    let base = mmap(nil, size, PROT_READ | PROT_WRITE, flags, -1, 0)!
    if base == MAP_FAILED { throw Errno.current }
    mapping = MemoryMapping(owning: .init(start: base, count: size))
    // Huge pages would allocate memory around every touched byte.
    madvise(base, size, MADV_NOHUGEPAGE)
    guard aliased else { return }
    let file = FileDescriptor(owning: try retryingInterrupts { memfd_create("sink", 0) })
    let descriptor = file.rawValue
    _ = try retryingInterrupts { ftruncate(descriptor, Self.fileBytes) }
    for offset in stride(from: 0, to: size, by: Self.fileBytes) {
      let place = mmap(
        base + offset, Self.fileBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, descriptor, 0
      )
      if place == MAP_FAILED { throw Errno.current }
    }
    // The last page too: the byte behind the range must stay zero.
    for offset in ownPages + [count / 4096 * 4096] {
      let place = mmap(
        base + offset, 4096, PROT_READ | PROT_WRITE, flags | MAP_FIXED, -1, 0)
      if place == MAP_FAILED { throw Errno.current }
    }
  }
}
