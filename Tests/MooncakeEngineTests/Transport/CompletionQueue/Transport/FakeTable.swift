import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// What the "hardware" of one engine knows: registered regions by their keys, and the states of the
/// queue pairs that peers are connected to. It lies in a memory file, so that the devices of other
/// processes look it up as the hardware would.
package final class FakeTable: @unchecked Sendable {
  // Unchecked: everything behind the mapping is atomic, or written before its key is published.
  package let process: pid_t
  /// The number of the file in its process.
  package let fileNumber: Int32
  package let identity: UInt64
  private let file: MemoryFile
  private let mapping: MemoryMapping
  /// nil for this process.
  private let handle: Lock<ProcessHandle>?
  private let isOwner: Bool
  private let spareRegions: Lock<[Int]>
  private let generation = Lock<UInt32>(0)

  private struct Region: ~Copyable {
    let key: Atomic<UInt32>
    /// Copies under way.
    let users: Atomic<UInt32>
    var device: UInt32
    var access: UInt32
    var address: UInt64
    var length: UInt64
  }

  private struct QueuePair: ~Copyable {
    /// A generation, and in the low two bits a state.
    let state: Atomic<UInt64>
    /// Copies under way.
    let users: Atomic<UInt64>
  }

  private enum State {
    static let free: UInt64 = 0
    static let ready: UInt64 = 1
    static let error: UInt64 = 2
    static let mask: UInt64 = 3
  }

  private struct Header: ~Copyable {
    let identity: Atomic<UInt64>
    let isClosed: Atomic<UInt64>
    /// Whether the owner does not answer when peers close queue pairs.
    let holdsCloses: Atomic<UInt64>
  }

  package static let regionCount = 1 << 15
  private static let queuePairCount = 2048
  private static let queuePairsOffset = 4096
  private static let regionsOffset = 4096 + queuePairCount * 16
  private static let byteCount = regionsOffset + regionCount * 32

  private var header: UnsafeMutablePointer<Header> {
    mapping.address.assumingMemoryBound(to: Header.self)
  }

  private func queuePair(_ index: Int) -> UnsafeMutablePointer<QueuePair> {
    (mapping.address + Self.queuePairsOffset).assumingMemoryBound(to: QueuePair.self) + index
  }

  private func region(_ index: Int) -> UnsafeMutablePointer<Region> {
    (mapping.address + Self.regionsOffset).assumingMemoryBound(to: Region.self) + index
  }

  /// Makes the table of an engine.
  package init() throws(Errno) {
    let file = try MemoryFile(name: "fake-verbs", byteCount: Self.byteCount)
    mapping = try file.map(writable: true)
    fileNumber = file.descriptor.rawValue
    self.file = file
    process = getpid()
    handle = nil
    isOwner = true
    identity = .random(in: 1 ... .max)
    spareRegions = Lock(Array((0..<Self.regionCount).reversed()))
    header.pointee.identity.store(identity, ordering: .sequentiallyConsistent)
  }

  /// Opens the table of any engine.
  package init(of process: pid_t, file number: Int32, identity: UInt64) throws(Errno) {
    let descriptor = try FileDescriptor.open("/proc/\(process)/fd/\(number)", flags: O_RDWR)
    let file = try MemoryFile(receiving: descriptor, byteCount: Self.byteCount)
    mapping = try file.map(writable: true)
    self.file = file
    fileNumber = number
    self.process = process
    handle = process == getpid() ? nil : Lock(try ProcessHandle(process))
    isOwner = false
    self.identity = identity
    spareRegions = Lock([])
    if header.pointee.identity.load(ordering: .sequentiallyConsistent) != identity {
      throw Errno(ESTALE)
    }
  }

  /// Whether the engine or its process has ended.
  package var hasEnded: Bool {
    header.pointee.isClosed.load(ordering: .sequentiallyConsistent) != 0
      || (handle?.withLock { $0.hasEnded } ?? false)
  }

  private var processHasEnded: Bool { handle?.withLock { $0.hasEnded } ?? false }

  /// Takes everything back from peers. Returns whether no copy is under way any more.
  package func close(until deadline: Deadline) -> Bool {
    header.pointee.isClosed.store(1, ordering: .sequentiallyConsistent)
    for index in 0..<Self.regionCount {
      region(index).pointee.key.store(0, ordering: .sequentiallyConsistent)
    }
    for index in 0..<Self.queuePairCount {
      let word = queuePair(index).pointee.state.load(ordering: .sequentiallyConsistent)
      breakQueuePair(UInt64(index) << 48 | word >> 2)
    }
    return isEventually(until: deadline) {
      (0..<Self.regionCount).allSatisfy {
        region($0).pointee.users.load(ordering: .sequentiallyConsistent) == 0
      }
    }
  }

  private func isEventually(until deadline: Deadline, _ condition: () -> Bool) -> Bool {
    while !condition() {
      if deadline.hasPassed { return false }
      sleepBriefly(nanoseconds: 20_000)
    }
    return true
  }
}

// MARK: - Regions

extension FakeTable {
  /// Registers a range with a device; returns its key, 0 if the table is full.
  package func register(
    _ address: UInt64, _ length: UInt64, _ access: Access, device: Int
  ) -> UInt32 {
    guard let index = spareRegions.withLock({ $0.popLast() }) else { return 0 }
    let count = generation.withLock { generation in
      generation = generation % (1 << 17 - 1) + 1
      return generation
    }
    let region = region(index)
    region.pointee.device = UInt32(device)
    region.pointee.access = access.rawValue
    region.pointee.address = address
    region.pointee.length = length
    let key = count << 15 | UInt32(index)
    region.pointee.key.store(key, ordering: .sequentiallyConsistent)
    return key
  }

  /// Gives the place of an invalidated key back; false while a copy with it is under way.
  package func release(_ key: UInt32) -> Bool {
    let index = Int(key) % Self.regionCount
    if region(index).pointee.users.load(ordering: .sequentiallyConsistent) != 0 { return false }
    spareRegions.withLock { $0.append(index) }
    return true
  }

  /// From here on no copy begins with the key.
  package func invalidate(_ key: UInt32) {
    _ = region(Int(key) % Self.regionCount).pointee.key.compareExchange(
      expected: key, desired: 0, ordering: .sequentiallyConsistent)
  }

  /// Begins a copy if the key is good for it; `leaveRegion` must follow.
  func enterRegion(
    _ key: UInt32, _ address: UInt64, _ length: Int, _ right: Access, device: Int
  ) -> Bool {
    let region = region(Int(key) % Self.regionCount)
    // Sequentially consistent: either the owner sees the user or this sees the key's end.
    region.pointee.users.wrappingAdd(1, ordering: .sequentiallyConsistent)
    if holds(key), region.pointee.device == UInt32(device),
      Access(rawValue: region.pointee.access).isSuperset(of: right),
      address >= region.pointee.address, UInt64(length) <= region.pointee.length,
      address - region.pointee.address <= region.pointee.length - UInt64(length)
    {
      return true
    }
    leaveRegion(key)
    return false
  }

  func holds(_ key: UInt32) -> Bool {
    key != 0
      && region(Int(key) % Self.regionCount).pointee.key.load(ordering: .sequentiallyConsistent)
        == key
  }

  func leaveRegion(_ key: UInt32) {
    region(Int(key) % Self.regionCount).pointee.users
      .wrappingSubtract(1, ordering: .sequentiallyConsistent)
  }
}

// MARK: - Queue pairs of peers

extension FakeTable {
  /// Connects a queue pair; nil if the engine takes none.
  func connectQueuePair() -> UInt64? {
    for index in 0..<Self.queuePairCount {
      let pair = queuePair(index)
      let word = pair.pointee.state.load(ordering: .relaxed)
      guard word & State.mask == State.free else { continue }
      let next = (word >> 2 + 1) << 2 | State.ready
      guard
        pair.pointee.state.compareExchange(
          expected: word, desired: next, ordering: .sequentiallyConsistent
        ).exchanged
      else { continue }
      let number = UInt64(index) << 48 | next >> 2
      if !hasEnded { return number }
      breakQueuePair(number)
      return nil
    }
    return nil
  }

  private func parts(_ number: UInt64) -> (UnsafeMutablePointer<QueuePair>, UInt64) {
    (queuePair(Int(number >> 48)), (number & (1 << 48 - 1)) << 2)
  }

  /// Begins a copy through a queue pair if it is ready; `leaveQueuePair` must follow.
  func enterQueuePair(_ number: UInt64) -> Bool {
    let (pair, generation) = parts(number)
    pair.pointee.users.wrappingAdd(1, ordering: .sequentiallyConsistent)
    if pair.pointee.state.load(ordering: .sequentiallyConsistent) == generation | State.ready {
      return true
    }
    leaveQueuePair(number)
    return false
  }

  func leaveQueuePair(_ number: UInt64) {
    parts(number).0.pointee.users.wrappingSubtract(1, ordering: .sequentiallyConsistent)
  }

  /// The queue pair takes nothing any more.
  func breakQueuePair(_ number: UInt64) {
    let (pair, generation) = parts(number)
    _ = pair.pointee.state.compareExchange(
      expected: generation | State.ready, desired: generation | State.error,
      ordering: .sequentiallyConsistent)
  }

  /// Asks the owner to close a queue pair; returns whether nothing of it can land any more.
  package func closeQueuePair(_ number: UInt64) -> Bool {
    if processHasEnded { return true }
    let (pair, generation) = parts(number)
    if header.pointee.holdsCloses.load(ordering: .sequentiallyConsistent) == 0 {
      breakQueuePair(number)
    }
    let word = pair.pointee.state.load(ordering: .sequentiallyConsistent)
    if word == generation | State.ready { return false }
    if pair.pointee.users.load(ordering: .sequentiallyConsistent) != 0 { return false }
    _ = pair.pointee.state.compareExchange(
      expected: generation | State.error, desired: generation | State.free,
      ordering: .sequentiallyConsistent)
    return true
  }

  /// For tests: whether the owner leaves requests to close queue pairs unanswered.
  package var holdsCloses: Bool {
    get { header.pointee.holdsCloses.load(ordering: .sequentiallyConsistent) != 0 }
    set { header.pointee.holdsCloses.store(newValue ? 1 : 0, ordering: .sequentiallyConsistent) }
  }
}
