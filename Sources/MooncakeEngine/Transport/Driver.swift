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

/// A set of an engine's drivers: a bit for each.
package struct DriverSet: Equatable, Sendable {
  fileprivate(set) var bits: UInt64 = 0

  package init() {}

  init(bits: UInt64) { self.bits = bits }

  package init(bit: Int) { insert(bit) }

  @inline(__always)
  package mutating func insert(_ bit: Int) { bits |= 1 << UInt64(bit) }

  @inline(__always)
  package mutating func formUnion(_ other: DriverSet) { bits |= other.bits }

  /// The bits of exclusive drivers.
  static let exclusive: UInt64 = 1 << 48 - 1
  /// Exclusive drivers from here on share a bit, and threads that wait do not drive them.
  static let sharedBit = 47
}

/// The drivers of one engine. It only grows, since transports may be attached while others work.
package final class DriverTable: @unchecked Sendable {
  // Unchecked: everything is written under the lock, and read through a count or a bit that another
  // thread has received after that.
  private let slots: UnsafeMutablePointer<Slot>
  private let slotCount = Atomic<Int>(0)
  /// The driver of each bit that is not shared.
  private let byBit: UnsafeMutablePointer<(any Driver)?>
  private let counts = Lock((exclusive: 0, cooperative: 0))

  private struct Slot {
    let driver: any Driver
    let bit: Int
  }

  package static let exclusiveLimit = 128
  package static let cooperativeLimit = 16

  package init() {
    slots = .allocate(capacity: Self.exclusiveLimit + Self.cooperativeLimit)
    byBit = .allocate(capacity: UInt64.bitWidth)
    byBit.initialize(repeating: nil, count: UInt64.bitWidth)
  }

  deinit {
    slots.deinitialize(count: slotCount.load(ordering: .relaxed))
    slots.deallocate()
    byBit.deinitialize(count: UInt64.bitWidth)
    byBit.deallocate()
  }

  /// Adds a driver; returns its bit in sets, or nil if the table is full.
  package func add<Added: Driver>(_ driver: Added) -> Int? {
    counts.withLock { counts in
      let bit: Int
      if Added.isExclusive {
        if counts.exclusive == Self.exclusiveLimit { return nil }
        bit = min(counts.exclusive, DriverSet.sharedBit)
        counts.exclusive += 1
      } else {
        if counts.cooperative == Self.cooperativeLimit { return nil }
        bit = DriverSet.sharedBit + 1 + counts.cooperative
        counts.cooperative += 1
      }
      if bit != DriverSet.sharedBit { byBit[bit] = driver }
      let position = slotCount.load(ordering: .relaxed)
      (slots + position).initialize(to: Slot(driver: driver, bit: bit))
      slotCount.store(position + 1, ordering: .releasing)
      return bit
    }
  }

  /// The one exclusive driver of a set: a thread that waits for the set may drive it. nil if there
  /// are none or several, whose threads then work at the same time.
  @inline(__always)
  package func onlyExclusive(of set: DriverSet) -> (any Driver)? {
    let bits = set.bits & DriverSet.exclusive
    return bits.nonzeroBitCount == 1 ? byBit[bits.trailingZeroBitCount] : nil
  }

  /// Whether a set has drivers that many threads may drive.
  @inline(__always)
  package func hasCooperative(_ set: DriverSet) -> Bool { set.bits & ~DriverSet.exclusive != 0 }

  /// Takes a part of the work of a set's drivers that many threads may drive; false if they have
  /// none.
  @inline(__always)
  package func help(_ set: DriverSet) -> Bool {
    var bits = set.bits & ~DriverSet.exclusive
    while bits != 0 {
      if let driver = byBit[bits.trailingZeroBitCount], driver.pollIfFree() { return true }
      bits &= bits - 1
    }
    return false
  }

  /// Kicks the exclusive drivers of a set. The others wake their threads when work is queued.
  package func kickExclusive(_ set: DriverSet) {
    forEach {
      if $0.bit <= DriverSet.sharedBit && set.bits & (1 << UInt64($0.bit)) != 0 { $0.driver.kick() }
    }
  }

  package func requestSweeps() { forEach { $0.driver.requestSweep() } }

  private func forEach(_ body: (Slot) -> Void) {
    for position in 0..<slotCount.load(ordering: .acquiring) { body(slots[position]) }
  }
}
