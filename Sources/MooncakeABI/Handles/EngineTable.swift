// Handles of engines. A handle looks like a pointer to C but is a number that this table decodes:
// nothing a caller passes is ever dereferenced, and stale handles are recognized.
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Which header a handle belongs to; the other header's functions refuse it.
enum HandleKind: UInt64 {
  case native = 1
  case dropIn = 2
  /// `transport_t`: no function takes one, so it never refers to an engine.
  case transport = 3
}

/// An engine with the C layer's state of it.
final class EngineRecord: Sendable {
  let engine: TransferEngine
  let dropIn = DropInState()

  init(_ engine: TransferEngine) { self.engine = engine }
}

/// The engines of the process.
final class EngineTable: @unchecked Sendable {
  // Unchecked: a slot's record is written only by the thread that has reserved the slot or is
  // closing it, and read only by its counted users.
  static var shared: EngineTable {
    @inline(__always) get {
      Globals.prepare()
      return table
    }
  }
  private static let table = EngineTable()
  static let capacity = 1024

  private struct Slot: ~Copyable {
    /// Generation in the upper half, two state bits, number of calls inside.
    let word: Atomic<UInt64>
    var record: UnsafeMutableRawPointer?
    // Slots of engines used by different threads must not share a cache line.
    private let padding: (UInt64, UInt64, UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0, 0, 0)

    init() {
      // Generations begin at 1, so that small integers are never handles.
      word = Atomic(1 << 32)
      record = nil
    }
  }

  private static let live: UInt64 = 1 << 31
  /// Neither free nor usable: the engine is being created or destroyed.
  private static let reserved: UInt64 = 1 << 30
  private static let userMask: UInt64 = (1 << 30) - 1

  private let slots: UnsafeMutablePointer<Slot>

  private init() {
    let size = Self.capacity * MemoryLayout<Slot>.stride
    slots = UnsafeMutableRawPointer.allocate(byteCount: size, alignment: 64)
      .bindMemory(to: Slot.self, capacity: Self.capacity)
    for index in 0..<Self.capacity { (slots + index).initialize(to: Slot()) }
  }

  static func prepare() {
    _ = table
    Fork.inChild { EngineTable.table.forgetEverything() }
  }

  /// Creates an engine and a handle for it.
  func insert(
    _ kind: HandleKind, _ make: () throws(MooncakeError) -> TransferEngine
  ) throws(MooncakeError) -> UInt64 {
    guard let index = reserve() else {
      throw MooncakeError(
        .full, "the process has \(Self.capacity) engines already: destroy one first")
    }
    let slot = slots + index
    let generation = slot.pointee.word.load(ordering: .relaxed) >> 32
    let engine: TransferEngine
    do throws(MooncakeError) {
      engine = try make()
    } catch {
      slot.pointee.word.store(generation << 32, ordering: .releasing)
      throw error
    }
    slot.pointee.record = Unmanaged.passRetained(EngineRecord(engine)).toOpaque()
    slot.pointee.word.store(generation << 32 | Self.live, ordering: .releasing)
    return Self.encode(index, generation, kind)
  }

  /// Runs `body` with the engine behind a handle, which stays alive meanwhile.
  @inline(__always)
  func with<Value>(
    _ handle: UInt64, _ kind: HandleKind,
    _ body: (EngineRecord) throws(MooncakeError) -> Value
  ) throws(MooncakeError) -> Value {
    let slot = try acquire(handle, kind)
    defer { Self.release(slot, handle) }
    let record = Unmanaged<EngineRecord>.fromOpaque(slot.pointee.record!)
    // A strong reference would make every call of every thread count on one more shared word.
    let result: Result<Value, MooncakeError> = record._withUnsafeGuaranteedRef { record in
      do throws(MooncakeError) {
        return .success(try body(record))
      } catch {
        return .failure(error)
      }
    }
    return try result.get()
  }

  /// Ends the engine: refuses new calls, waits for those inside to return, then frees it.
  func destroy(_ handle: UInt64, _ kind: HandleKind) throws(MooncakeError) {
    let slot = try acquire(handle, kind)
    let generation = Self.generation(of: handle)
    // Also ends this call's own use. The thread that changes live to reserved is the one that
    // destroys.
    let old = slot.pointee.word.load(ordering: .relaxed)
    var word = old
    while true {
      guard word >> 32 == generation, word & Self.live != 0 else {
        Self.release(slot, handle)
        throw Self.unknown
      }
      let closing = (word & ~Self.live | Self.reserved) - 1
      let (exchanged, current) = slot.pointee.word.compareExchange(
        expected: word, desired: closing, ordering: .acquiringAndReleasing)
      if exchanged { break }
      word = current
    }
    let record = Unmanaged<EngineRecord>.fromOpaque(slot.pointee.record!)
    record._withUnsafeGuaranteedRef { $0.engine.close() }
    // Closing made blocked callers return; each has only a few instructions left.
    while slot.pointee.word.load(ordering: .acquiring) & Self.userMask != 0 { usleep(50) }
    slot.pointee.record = nil
    record.release()
    slot.pointee.word.store(Self.next(generation) << 32, ordering: .releasing)
  }

  /// Handles of the engines of one kind for which `isWanted` holds.
  func handles(_ kind: HandleKind, where isWanted: (EngineRecord) -> Bool) -> [UInt64] {
    (0..<Self.capacity).compactMap { index in
      let word = slots[index].word.load(ordering: .acquiring)
      if word & Self.live == 0 { return nil }
      let handle = Self.encode(index, word >> 32, kind)
      let wanted = try? with(handle, kind) { record throws(MooncakeError) in isWanted(record) }
      return wanted == true ? handle : nil
    }
  }

  /// Invalidates every handle without touching the engines; for a forked child, where their threads
  /// do not exist and their locks may be held forever.
  private func forgetEverything() {
    for index in 0..<Self.capacity {
      let word = slots[index].word.load(ordering: .relaxed)
      if word & (Self.live | Self.reserved) == 0 { continue }
      slots[index].record = nil
      slots[index].word.store(Self.next(word >> 32) << 32, ordering: .relaxed)
    }
    ThreadState.forgetCallbacks()
  }

  private func reserve() -> Int? {
    for index in 0..<Self.capacity {
      let word = slots[index].word.load(ordering: .relaxed)
      if word & (Self.live | Self.reserved) != 0 { continue }
      let (exchanged, _) = slots[index].word.compareExchange(
        expected: word, desired: word | Self.reserved, ordering: .acquiringAndReleasing)
      if exchanged { return index }
    }
    return nil
  }

  @inline(__always)
  private func acquire(
    _ handle: UInt64, _ kind: HandleKind
  ) throws(MooncakeError) -> UnsafeMutablePointer<Slot> {
    guard handle & 0b111 == kind.rawValue << 1 | 1, handle >> 45 == 0 else { throw Self.unknown }
    if ThreadState.isInsideLogCallback {
      throw MooncakeError(.invalidArgument, "a log callback must not call the library")
    }
    let slot = slots + Int(truncatingIfNeeded: handle >> 3) & (Self.capacity - 1)
    let generation = Self.generation(of: handle)
    var word = slot.pointee.word.load(ordering: .relaxed)
    while true {
      guard word >> 32 == generation, word & Self.live != 0 else { throw Self.unknown }
      let (exchanged, current) = slot.pointee.word.weakCompareExchange(
        expected: word, desired: word + 1, successOrdering: .acquiring, failureOrdering: .relaxed)
      if exchanged { return slot }
      word = current
    }
  }

  @inline(__always)
  private static func release(_ slot: UnsafeMutablePointer<Slot>, _ handle: UInt64) {
    var word = slot.pointee.word.load(ordering: .relaxed)
    // With another generation, a callback of this call has forked and this is the child.
    while word >> 32 == generation(of: handle) {
      let (exchanged, current) = slot.pointee.word.weakCompareExchange(
        expected: word, desired: word - 1, successOrdering: .releasing, failureOrdering: .relaxed)
      if exchanged { return }
      word = current
    }
  }

  // A handle from its low end: 1 (so that it is never an aligned pointer), kind, 10 bits of index,
  // generation.
  private static func encode(_ index: Int, _ generation: UInt64, _ kind: HandleKind) -> UInt64 {
    generation << 13 | UInt64(index) << 3 | kind.rawValue << 1 | 1
  }

  private static func generation(of handle: UInt64) -> UInt64 { handle >> 13 }

  private static func next(_ generation: UInt64) -> UInt64 {
    generation == 0xFFFF_FFFF ? 1 : generation + 1
  }

  private static var unknown: MooncakeError {
    MooncakeError(
      .invalidHandle,
      "the handle is null, foreign, from before a fork, or of an engine that was destroyed")
  }
}
