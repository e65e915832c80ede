import MooncakeBase
import Synchronization

/// The local side of requests. A range that touches registered memory must lie in it wholly, so
/// that a wrong length is refused before it overwrites what lies behind a buffer; buffers that
/// border on each other count as one. Memory that is registered nowhere is the caller's matter.
///
/// Stretches found once are kept until the set of buffers changes, so that a look-up as a rule
/// reads a few words and takes no lock.
package final class LocalRanges: @unchecked Sendable {
  // Unchecked: the entries are atomics that live as long as this.

  /// Memory that is registered throughout, or of which nothing is.
  package struct Stretch {
    let start: UInt64
    let end: UInt64

    static let nothing = Stretch(start: 0, end: 0)

    /// `address + length` does not overflow.
    @inline(__always)
    package func holds(_ address: UInt64, _ length: UInt64) -> Bool {
      address >= start && address &+ length <= end
    }
  }

  /// A stretch and the version of the buffers that it is true of. Odd sequence: being written.
  private struct Entry: ~Copyable {
    let sequence = Atomic<UInt64>(0)
    let version = Atomic<UInt64>(0)
    let start = Atomic<UInt64>(0)
    let end = Atomic<UInt64>(0)
  }

  private static let entryCount = 16
  /// Addresses that share an entry: threads with memory of their own rarely do.
  private static let entryShift: UInt64 = 21

  private let buffers: BufferTable
  private let entries = UnsafeMutablePointer<Entry>.allocate(capacity: entryCount)

  package init(_ buffers: BufferTable) {
    self.buffers = buffers
    for index in 0..<Self.entryCount { (entries + index).initialize(to: Entry()) }
  }

  deinit {
    entries.deinitialize(count: Self.entryCount)
    entries.deallocate()
  }

  /// The stretch that holds the range; throws if the range lies partly in registered memory.
  @inline(__always)
  package func find(
    _ address: UInt64, _ length: UInt64, request: Int
  ) throws(EngineError) -> Stretch {
    let entry = entries + Int((address >> Self.entryShift) & UInt64(Self.entryCount - 1))
    let sequence = entry.pointee.sequence.load(ordering: .acquiring)
    let version = entry.pointee.version.load(ordering: .relaxed)
    let stretch = Stretch(
      start: entry.pointee.start.load(ordering: .relaxed),
      end: entry.pointee.end.load(ordering: .relaxed))
    atomicMemoryFence(ordering: .acquiring)
    if entry.pointee.sequence.load(ordering: .relaxed) == sequence, sequence & 1 == 0,
      version == buffers.version, stretch.holds(address, length)
    {
      return stretch
    }
    return try lookUp(address, length, request, entry)
  }

  @inline(never)
  private func lookUp(
    _ address: UInt64, _ length: UInt64, _ request: Int, _ entry: UnsafeMutablePointer<Entry>
  ) throws(EngineError) -> Stretch {
    // Before the snapshot: an entry that is newer than it says is only replaced too early.
    let version = buffers.version
    let table = buffers.snapshot
    let stretch = Self.stretch(in: table, around: address, to: address &+ length)
    guard stretch.holds(address, length) else {
      let range = RemoteBuffer(address: address, length: length, access: .local)
      throw Self.refusal(request, range, table)
    }
    let sequence = entry.pointee.sequence.load(ordering: .relaxed)
    let (isOurs, _) = entry.pointee.sequence.compareExchange(
      expected: sequence & ~1, desired: sequence | 1, ordering: .acquiringAndReleasing)
    if isOurs {
      atomicMemoryFence(ordering: .releasing)
      entry.pointee.version.store(version, ordering: .relaxed)
      entry.pointee.start.store(stretch.start, ordering: .relaxed)
      entry.pointee.end.store(stretch.end, ordering: .relaxed)
      entry.pointee.sequence.store((sequence | 1) &+ 1, ordering: .releasing)
    }
    return stretch
  }

  /// The stretch that `address` lies in, at least as far as `end` if it goes there.
  private static func stretch(
    in table: RangeTable, around address: UInt64, to end: UInt64
  ) -> Stretch {
    let buffers = table.buffers
    var next = table.countBeginning(upTo: address)
    let start = next == 0 ? 0 : buffers[next - 1].address
    var reach = next == 0 ? 0 : start &+ buffers[next - 1].length
    if address >= reach {
      return Stretch(start: reach, end: next < buffers.count ? buffers[next].address : .max)
    }
    while reach < end, next < buffers.count, buffers[next].address == reach {
      reach &+= buffers[next].length
      next += 1
    }
    return Stretch(start: start, end: reach)
  }

  private static func refusal(
    _ request: Int, _ range: RemoteBuffer, _ table: RangeTable
  ) -> EngineError {
    let after = table.countBeginning(upTo: range.address)
    let isInside =
      after > 0
      && range.address &- table.buffers[after - 1].address < table.buffers[after - 1].length
    let buffer = table.buffers[isInside ? after - 1 : after]
    let end = String(buffer.address &+ buffer.length, radix: 16)
    let what =
      isInside ? "begins inside the registered buffer" : "runs into the registered buffer"
    return EngineError(
      .notRegistered,
      "request \(request): the local range \(BufferTable.describe(range)) \(what) "
        + "\(BufferTable.describe(buffer)), which ends at 0x\(end), and is not registered as a "
        + "whole: correct its length, or register all of it")
  }
}
