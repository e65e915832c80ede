import MooncakeSystem
import Synchronization

/// What moves queued slices while a thread drives it: a loop over sockets, a queue of copies, a
/// poller of a completion queue. It has threads of its own. A thread that waits for a batch, or
/// polls it, may drive it as well, which saves the wake-ups.
package protocol Driver: AnyObject, Sendable {
  /// Whether one thread at a time drives it. Of the others, many threads may each take a part.
  static var isExclusive: Bool { get }

  /// Makes sure that a thread looks at what is queued soon.
  func kick()

  /// As `kick`, for work that its submitter is about to drive: may leave a thread alone that looks
  /// by itself within a millisecond.
  func nudge()

  /// Makes sure that deadlines and cancellations are looked at now.
  func requestSweep()

  /// One turn without waiting, unless another thread drives. Returns whether there was work to do.
  func pollIfFree() -> Bool

  /// Drives until `isDone` or the deadline, if no other thread does. Returns whether it did.
  func driveIfFree(until deadline: Deadline, isDone: () -> Bool) -> Bool
}

/// A set of an engine's drivers.
package struct DriverSet: Equatable, Sendable {
  var bits: UInt64

  package init() { bits = 0 }

  init(bits: UInt64) { self.bits = bits }

  package var isEmpty: Bool { bits == 0 }

  @inline(__always)
  package mutating func insert(_ index: Int) { bits |= 1 << UInt64(index) }
}

/// The drivers of one engine. It only grows, since transports may be attached while others work.
package final class DriverTable: @unchecked Sendable {
  // Unchecked: a slot is written once, under the lock, before `count` shows it.
  private let slots: UnsafeMutablePointer<Slot>
  private let count = Atomic<Int>(0)
  private let exclusive = Atomic<UInt64>(0)
  private let lock = Lock(())

  private struct Slot {
    let driver: any Driver
    let isExclusive: Bool
  }

  package static let capacityLimit = 128
  /// Drivers from here on share the last bit of a set. Threads that wait do not drive those.
  private static let sharedIndex = 63

  package init() { slots = .allocate(capacity: Self.capacityLimit) }

  deinit {
    slots.deinitialize(count: count.load(ordering: .relaxed))
    slots.deallocate()
  }

  /// Adds a driver; returns its index in sets, or nil if the table is full.
  package func add<Added: Driver>(_ driver: Added) -> Int? {
    lock.withLock { _ in
      let position = count.load(ordering: .relaxed)
      if position == Self.capacityLimit { return nil }
      (slots + position).initialize(to: Slot(driver: driver, isExclusive: Added.isExclusive))
      let index = min(position, Self.sharedIndex)
      if Added.isExclusive && position < Self.sharedIndex {
        exclusive.bitwiseOr(1 << UInt64(index), ordering: .relaxed)
      }
      count.store(position + 1, ordering: .releasing)
      return index
    }
  }

  /// The one exclusive driver of a set: a thread that waits for the set may drive it. nil if there
  /// are none or several, whose threads then work at the same time.
  @inline(__always)
  package func onlyExclusive(of set: DriverSet) -> (any Driver)? {
    let bits = set.bits & exclusive.load(ordering: .relaxed)
    if bits.nonzeroBitCount != 1 || hasShared(set) { return nil }
    return slots[bits.trailingZeroBitCount].driver
  }

  @inline(__always)
  private func hasShared(_ set: DriverSet) -> Bool { set.bits >> UInt64(Self.sharedIndex) != 0 }

  /// Whether a set has drivers that many threads may drive.
  @inline(__always)
  package func hasCooperative(_ set: DriverSet) -> Bool {
    set.bits & ~exclusive.load(ordering: .relaxed) & ~(1 << UInt64(Self.sharedIndex)) != 0
  }

  /// Takes a part of the work of a set's drivers that many threads may drive; false if they have
  /// none.
  @inline(__always)
  package func help(_ set: DriverSet) -> Bool {
    var bits = set.bits & ~exclusive.load(ordering: .relaxed) & ~(1 << UInt64(Self.sharedIndex))
    while bits != 0 {
      if slots[bits.trailingZeroBitCount].driver.pollIfFree() { return true }
      bits &= bits - 1
    }
    return false
  }

  package func kick(_ set: DriverSet) {
    forEach(of: set) { $0.kick() }
  }

  package func requestSweeps() {
    forEach(of: DriverSet(bits: .max)) { $0.requestSweep() }
  }

  private func forEach(of set: DriverSet, _ body: (any Driver) -> Void) {
    for position in 0..<count.load(ordering: .acquiring) {
      let index = min(position, Self.sharedIndex)
      if set.bits & (1 << UInt64(index)) != 0 { body(slots[position].driver) }
    }
  }
}
