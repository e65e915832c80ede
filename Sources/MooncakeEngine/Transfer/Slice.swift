import MooncakeSystem
import Synchronization

/// The part of a request that travels over one connection. Lives in its batch (a request's first
/// slice) or in the slice pool (the others); is owned by one queue at a time.
package struct Slice {
  package var next: UnsafeMutablePointer<Slice>?
  package let task: UnsafeMutablePointer<TransferTask>
  package let local: UnsafeMutableRawPointer
  package let remote: UInt64
  package let length: Int
  /// On `Clock`.
  package let deadline: UInt64
  package let opcode: Opcode
  /// How often its path has failed with it in flight.
  package var attempts: UInt8 = 0
  /// Of a piece: the life of the target's process that it goes to, as `SegmentRoute.life`.
  package var life: UInt32 = 0
  /// The marks of the paths that could not move it.
  package var triedPaths: UInt64 = 0
  /// Index of the target's buffer in its descriptor, whose remote key the path may need.
  package var remoteBuffer: Int32 = -1
  /// For the transport that has it.
  package var transportWord: UInt64 = 0
  /// Whether any of it was sent on a connection that has since ended.
  package var wasSent = false
  /// Whether it is a piece of a request.
  package var wasCut = false
  /// Whether the target's descriptor was refetched for it.
  package var isRefetched = false
  package let isPooled: Bool
  #if DEBUG
    fileprivate var isListed = false
  #endif

  package init(
    task: UnsafeMutablePointer<TransferTask>, local: UnsafeMutableRawPointer, remote: UInt64,
    length: Int, deadline: UInt64, opcode: Opcode, isPooled: Bool
  ) {
    self.task = task
    self.local = local
    self.remote = remote
    self.length = length
    self.deadline = deadline
    self.opcode = opcode
    self.isPooled = isPooled
  }

  package var batch: Batch { task.pointee.batch }

  /// In debug builds, stops whoever puts a slice on a second list.
  @inline(__always)
  fileprivate mutating func enterList() {
    #if DEBUG
      assert(!isListed, "a slice on two lists")
      isListed = true
    #endif
  }

  @inline(__always)
  fileprivate mutating func leaveList() {
    #if DEBUG
      assert(isListed, "a slice taken from a list that has lost it")
      isListed = false
    #endif
  }

  /// In debug builds, stops whoever ends a slice that a list still holds.
  @inline(__always)
  package func assertUnlisted() {
    #if DEBUG
      assert(!isListed, "a slice was ended on a list")
    #endif
  }
}

package typealias SlicePointer = UnsafeMutablePointer<Slice>

/// A first-in first-out list of slices linked through `next`.
package struct SliceQueue {
  package private(set) var first: SlicePointer?
  private var last: SlicePointer?
  package private(set) var count = 0

  package init() {}

  package var isEmpty: Bool { first == nil }

  @inline(__always)
  package mutating func append(_ slice: SlicePointer) {
    slice.pointee.enterList()
    link(slice)
  }

  /// Appends a slice that came from another list.
  @inline(__always)
  fileprivate mutating func link(_ slice: SlicePointer) {
    slice.pointee.next = nil
    if let last { last.pointee.next = slice } else { first = slice }
    last = slice
    count += 1
  }

  /// Moves every slice of `other` to the end.
  @inline(__always)
  package mutating func append(contentsOf other: inout SliceQueue) {
    guard let otherFirst = other.first else { return }
    if let last { last.pointee.next = otherFirst } else { first = otherFirst }
    last = other.last
    count += other.count
    other = SliceQueue()
  }

  @inline(__always)
  package mutating func popFirst() -> SlicePointer? {
    guard let slice = first else { return nil }
    first = slice.pointee.next
    if first == nil { last = nil }
    count -= 1
    slice.pointee.leaveList()
    return slice
  }

  /// Moves every slice out.
  package mutating func takeAll() -> SliceQueue {
    defer { self = SliceQueue() }
    return self
  }

  package var byteCount: Int {
    var sum = 0
    var cursor = first
    while let slice = cursor {
      sum += slice.pointee.length
      cursor = slice.pointee.next
    }
    return sum
  }

  /// The earliest deadline of the slices; `max` if there are none.
  package var earliestDeadline: UInt64 {
    var earliest = UInt64.max
    var cursor = first
    while let slice = cursor {
      earliest = min(earliest, slice.pointee.deadline)
      cursor = slice.pointee.next
    }
    return earliest
  }

  /// The latest deadline of the slices; `max` if there are none.
  package var latestDeadline: UInt64 {
    var latest: UInt64 = 0
    var cursor = first
    while let slice = cursor {
      latest = max(latest, slice.pointee.deadline)
      cursor = slice.pointee.next
    }
    return isEmpty ? .max : latest
  }

  /// Moves the slices for which `isWanted` holds to the returned queue; order is kept in both.
  package mutating func removeAll(where isWanted: (SlicePointer) -> Bool) -> SliceQueue {
    var kept = SliceQueue()
    var removed = SliceQueue()
    while let slice = popFirst() {
      if isWanted(slice) { removed.append(slice) } else { kept.append(slice) }
    }
    self = kept
    return removed
  }
}

/// A lock-free queue: any thread appends, one thread takes everything. Pushed chains form a stack,
/// which the taker reverses.
package struct SliceInbox: ~Copyable {
  private let top = Atomic<UInt>(0)

  package init() {}

  @inline(__always)
  package var isEmpty: Bool { top.load(ordering: .acquiring) == 0 }

  /// Appends a queue. Its links are reversed first, so that the taker's single reversal restores
  /// the order within and between pushes.
  package func push(_ queue: consuming SliceQueue) {
    guard let oldest = queue.first else { return }
    var newest: SlicePointer? = nil
    var cursor: SlicePointer? = oldest
    while let slice = cursor {
      cursor = slice.pointee.next
      slice.pointee.next = newest
      newest = slice
    }
    var old = top.load(ordering: .relaxed)
    while true {
      oldest.pointee.next = SlicePointer(bitPattern: old)
      let (exchanged, current) = top.weakCompareExchange(
        expected: old, desired: UInt(bitPattern: newest), successOrdering: .releasing,
        failureOrdering: .relaxed)
      if exchanged { return }
      old = current
    }
  }

  /// Takes everything, oldest first. Only the inbox's owner may call it.
  package func takeAll() -> SliceQueue {
    var cursor = SlicePointer(bitPattern: top.exchange(0, ordering: .acquiring))
    var reversed: SlicePointer? = nil
    while let slice = cursor {
      cursor = slice.pointee.next
      slice.pointee.next = reversed
      reversed = slice
    }
    var queue = SliceQueue()
    while let slice = reversed {
      reversed = slice.pointee.next
      queue.link(slice)
    }
    return queue
  }
}

/// Slices beyond each task's first. Each carries at least a megabyte, so a lock costs nothing in
/// comparison.
package final class SlicePool: Sendable {
  private struct State {
    var free: SlicePointer?
    var freeCount = 0
    var slabs: [UnsafeMutablePointer<Slice>] = []
  }

  // Unchecked: the pointers inside are touched only under the lock.
  private struct Box: @unchecked Sendable { var state = State() }
  private let box = Lock(Box())
  private static let slabCount = 1024

  package init() {}

  deinit {
    for slab in box.withLock({ $0.state.slabs }) { slab.deallocate() }
  }

  /// Takes `count` uninitialized slices, linked through `next`.
  package func take(_ count: Int) -> SlicePointer? {
    box.withLock { box in
      while box.state.freeCount < count { Self.grow(&box.state) }
      var result: SlicePointer?
      for _ in 0..<count {
        let slice = box.state.free!
        box.state.free = slice.pointee.next
        slice.pointee.next = result
        result = slice
      }
      box.state.freeCount -= count
      return result
    }
  }

  package func give(_ slice: SlicePointer) {
    box.withLock { box in
      slice.pointee.next = box.state.free
      box.state.free = slice
      box.state.freeCount += 1
    }
  }

  private static func grow(_ state: inout State) {
    // Slices are trivial, so zeroed memory is a valid free slice.
    let slab = UnsafeMutableRawPointer.allocate(
      byteCount: slabCount * MemoryLayout<Slice>.stride, alignment: 64)
    slab.initializeMemory(
      as: UInt8.self, repeating: 0, count: slabCount * MemoryLayout<Slice>.stride)
    let slices = slab.bindMemory(to: Slice.self, capacity: slabCount)
    state.slabs.append(slices)
    for index in 0..<slabCount {
      slices[index].next = state.free
      state.free = slices + index
    }
    state.freeCount += slabCount
  }
}
