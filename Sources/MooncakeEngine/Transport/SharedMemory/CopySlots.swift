import CLinux
import MooncakeBase
import MooncakeSystem
import Synchronization

/// Slots in which the threads of one peer announce their copies, so that the owner of the memory
/// can wait until the copies that have begun are over.
///
/// A slot's word: sequence (31 bits), whether the copy is guarded, thread number (32 bits, 0 while
/// the slot is free). It works because of the order: a peer occupies a slot, then reads the guard;
/// the owner changes the guard, then reads the slots. At least one of them sees the other.
struct CopySlots: ~Copyable, @unchecked Sendable {
  // Unchecked: the words are atomic.
  private let mapping: MemoryMapping
  private let base: UnsafeMutableRawPointer

  private static let threadMask: UInt64 = 0xFFFF_FFFF
  private static let guarded: UInt64 = 1 << 32
  private static let sequenceStep: UInt64 = 1 << 33

  private static let spinCount = 2000
  private static let firstSleepNanoseconds: UInt64 = 20_000
  private static let sleepLimitNanoseconds: UInt64 = 1_000_000
  /// Copies take less time; after this it is worth checking whether the thread still runs.
  private static let checkNanoseconds: UInt64 = 3_000_000
  private static let warningNanoseconds: UInt64 = 1_000_000_000

  /// A slot that the calling thread occupies.
  struct Occupied {
    fileprivate let word: UnsafeMutablePointer<Atomic<UInt64>>
    fileprivate let value: UInt64
  }

  init(_ file: borrowing MemoryFile) throws(Errno) {
    mapping = try file.map(writable: true)
    base = mapping.address
  }

  @inline(__always)
  private func word(_ index: Int) -> UnsafeMutablePointer<Atomic<UInt64>> {
    (base + index * SharedMemoryLayout.slotBytes)
      .assumingMemoryBound(to: Atomic<UInt64>.self)
  }

  /// Occupies a slot; `leave` must follow soon.
  @inline(__always)
  func enter(isGuarded: Bool) -> Occupied {
    let thread = UInt64(UInt32(bitPattern: linux_thread_number(Fork.generation)))
    let mark = thread | (isGuarded ? Self.guarded : 0)
    let mask = SharedMemoryLayout.slotCount - 1
    let first = Int(thread) & mask
    var index = first
    while true {
      let word = word(index)
      let old = word.pointee.load(ordering: .relaxed)
      if old & Self.threadMask == 0 {
        let new = (old & ~(Self.guarded | Self.threadMask)) &+ Self.sequenceStep | mark
        // Sequentially consistent: the guard is read after this.
        let (exchanged, _) = word.pointee.compareExchange(
          expected: old, desired: new, ordering: .sequentiallyConsistent)
        if exchanged { return Occupied(word: word, value: new) }
      }
      index = (index + 1) & mask
      if index == first { yieldProcessor() }
    }
  }

  @inline(__always)
  static func leave(_ slot: Occupied) {
    slot.word.pointee.store(slot.value & ~(guarded | threadMask), ordering: .releasing)
  }

  /// Waits until every copy that had begun before the guard changed is over or can never continue.
  /// Returns a thread that still copies when the deadline has passed or the wait is canceled: it
  /// may still touch the memory.
  ///
  /// Guarded copies of a stopped thread count as over: when it is continued, it looks at the guard
  /// before it touches memory. Others are waited for as long as their thread lives.
  func drain(
    _ process: borrowing ProcessHandle, until deadline: Deadline, unless isCanceled: () -> Bool
  ) -> Int32? {
    var late: Int32?
    for index in 0..<SharedMemoryLayout.slotCount {
      let word = word(index)
      let value = word.pointee.load(ordering: .sequentiallyConsistent)
      if value & Self.threadMask == 0 { continue }
      var spins = 0
      while spins < Self.spinCount, word.pointee.load(ordering: .acquiring) == value {
        relaxProcessor()
        spins += 1
      }
      if spins < Self.spinCount || waitForChange(word, value, process, deadline, isCanceled) {
        continue
      }
      late = Self.thread(value)
    }
    return late
  }

  /// Whether no thread of the process is in the middle of a copy.
  func areFree(_ process: borrowing ProcessHandle) -> Bool {
    if process.hasEnded { return true }
    for index in 0..<SharedMemoryLayout.slotCount {
      let value = word(index).pointee.load(ordering: .sequentiallyConsistent)
      if value & Self.threadMask != 0 && process.exists(thread: Self.thread(value)) { return false }
    }
    return true
  }

  private static func thread(_ value: UInt64) -> Int32 {
    Int32(bitPattern: UInt32(value & threadMask))
  }

  /// Whether the copy is over or can never continue.
  private func waitForChange(
    _ word: UnsafeMutablePointer<Atomic<UInt64>>, _ value: UInt64,
    _ process: borrowing ProcessHandle, _ deadline: Deadline, _ isCanceled: () -> Bool
  ) -> Bool {
    let start = Clock.now()
    let thread = Self.thread(value)
    var pause = Self.firstSleepNanoseconds
    var hasWarned = false
    while word.pointee.load(ordering: .acquiring) == value {
      sleepBriefly(nanoseconds: pause)
      pause = min(pause * 2, Self.sleepLimitNanoseconds)
      let waited = Clock.now() &- start
      if waited < Self.checkNanoseconds { continue }
      if process.hasEnded || !process.exists(thread: thread) { return true }
      if value & Self.guarded != 0, process.isStopped(thread: thread) { return true }
      if deadline.hasPassed || isCanceled() { return false }
      if waited > Self.warningNanoseconds && !hasWarned {
        hasWarned = true
        Log.warning(
          "shared memory: thread \(thread) of process \(process.id) is in the middle of a copy "
            + "from or to a buffer that is being unregistered; waiting for it",
          about: "process \(process.id)")
      }
    }
    return true
  }
}
