import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// Resolves batch ids. An id carries its slot's generation, so freed and made-up ids are refused. A
/// slot counts its users, so a batch is never freed under a caller.
package final class BatchTable: @unchecked Sendable {
  // Unchecked: slots are published through atomics, the rest is guarded by `free`.
  package static let capacity = 65_536
  /// Capacity of all batches together; bounds what may be queued at once.
  package static let requestLimit = 1 << 24

  /// Word: generation in the high half, live flag in bit 31, user count below.
  private struct Slot: ~Copyable {
    let word = Atomic<UInt64>(0)
    var batch: Batch?
  }

  private static let live: UInt64 = 1 << 31
  private static let userMask: UInt64 = live - 1

  private let slots: UnsafeMutablePointer<Slot>
  private struct Free: Sendable {
    var indices: [UInt32] = []
    var nextUnused: UInt32 = 0
  }
  private let free = Lock(Free())

  package init() {
    // Untouched pages of this large allocation cost no memory.
    slots = .allocate(capacity: Self.capacity)
  }

  deinit {
    let used = free.withLock { Int($0.nextUnused) }
    slots.deinitialize(count: used)
    slots.deallocate()
  }

  /// Adds a batch and returns its id, which also becomes `batch.id`.
  package func insert(_ batch: Batch) throws(MooncakeError) -> UInt64 {
    let sum = requests.wrappingAdd(batch.capacity, ordering: .relaxed).newValue
    var isInserted = false
    defer {
      if !isInserted { requests.wrappingSubtract(batch.capacity, ordering: .relaxed) }
    }
    if sum > Self.requestLimit {
      throw MooncakeError(
        .full,
        "the batches hold \(sum - batch.capacity) requests, \(batch.capacity) more would exceed "
          + "\(Self.requestLimit): free batches, or create smaller ones")
    }
    let index: UInt32? = free.withLock { free in
      if let index = free.indices.popLast() { return index }
      if free.nextUnused == UInt32(Self.capacity) { return nil }
      // Initialized under the lock, before the count that lookups check.
      (slots + Int(free.nextUnused)).initialize(to: Slot())
      free.nextUnused += 1
      used.store(Int(free.nextUnused), ordering: .releasing)
      return free.nextUnused - 1
    }
    guard let index else {
      throw MooncakeError(.full, "\(Self.capacity) batches exist: free some with freeBatch")
    }
    let slot = slots + Int(index)
    let generation = (slot.pointee.word.load(ordering: .relaxed) >> 32) & 0x7FFF_FFFF
    batch.id = generation << 32 | UInt64(index) + 1
    slot.pointee.batch = batch
    slot.pointee.word.store(generation << 32 | Self.live, ordering: .releasing)
    isInserted = true
    return batch.id
  }

  private let used = Atomic<Int>(0)
  private let requests = Atomic<Int>(0)

  /// Runs `body` with the batch, which stays alive meanwhile.
  @inline(__always)
  package func with<Result>(
    _ id: UInt64, _ body: (Batch) throws(MooncakeError) -> Result
  ) throws(MooncakeError) -> Result {
    let slot = try acquire(id)
    defer { slot.pointee.word.wrappingSubtract(1, ordering: .releasing) }
    return try body(slot.pointee.batch!)
  }

  /// Removes a batch that `mayFree` approves and waits until nobody uses it.
  package func remove(_ id: UInt64, mayFree: (Batch) -> Bool) throws(MooncakeError) {
    let slot = try acquire(id)
    guard mayFree(slot.pointee.batch!) else {
      slot.pointee.word.wrappingSubtract(1, ordering: .releasing)
      throw MooncakeError(.busy, "transfers of the batch are still in flight")
    }
    let old = slot.pointee.word.bitwiseAnd(~Self.live, ordering: .acquiringAndReleasing).oldValue
    if old & Self.live == 0 {
      // Another thread is removing it.
      slot.pointee.word.wrappingSubtract(1, ordering: .releasing)
      throw Self.unknown(id)
    }
    while slot.pointee.word.load(ordering: .acquiring) & Self.userMask != 1 { sched_yield() }
    let batch = slot.pointee.batch!
    batch.waitUntilQuiet()
    requests.wrappingSubtract(batch.capacity, ordering: .relaxed)
    slot.pointee.batch = nil
    let generation = ((id >> 32) &+ 1) & 0x7FFF_FFFF
    slot.pointee.word.store(generation << 32, ordering: .releasing)
    free.withLock { $0.indices.append(UInt32(id & 0xFFFF_FFFF) - 1) }
  }

  /// Runs `body` with every live batch.
  package func withEach(_ body: (Batch) -> Void) {
    for index in 0..<used.load(ordering: .acquiring) {
      let word = slots[index].word.load(ordering: .acquiring)
      if word & Self.live == 0 { continue }
      try? with((word >> 32) << 32 | UInt64(index) + 1) { batch throws(MooncakeError) in body(batch)
      }
    }
  }

  @inline(__always)
  private func acquire(_ id: UInt64) throws(MooncakeError) -> UnsafeMutablePointer<Slot> {
    let index = Int(id & 0xFFFF_FFFF) - 1
    guard index >= 0, index < used.load(ordering: .acquiring) else { throw Self.unknown(id) }
    let slot = slots + index
    var word = slot.pointee.word.load(ordering: .relaxed)
    while true {
      guard word >> 32 == id >> 32, word & Self.live != 0 else { throw Self.unknown(id) }
      let (exchanged, current) = slot.pointee.word.weakCompareExchange(
        expected: word, desired: word + 1, successOrdering: .acquiring, failureOrdering: .relaxed)
      if exchanged { return slot }
      word = current
    }
  }

  private static func unknown(_ id: UInt64) -> MooncakeError {
    MooncakeError(.invalidHandle, "batch \(id) does not exist or was freed")
  }
}
