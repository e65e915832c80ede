import MooncakeBase
import Synchronization

/// Checks the local side of requests. A range that touches registered memory must lie wholly inside
/// it, so that a wrong length is refused before it overwrites what follows a buffer; adjacent
/// buffers count as one. Unregistered memory is not checked.
///
/// Stretches are cached until the set of buffers changes, so a look-up usually reads a few words
/// and takes no lock.
package final class LocalRanges: @unchecked Sendable {
  // Unchecked: the entries are atomics that live as long as this object.

  /// A range of memory that is either wholly registered or not registered at all.
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

  /// A cached stretch and the buffer version that it holds for. An odd sequence means it is being
  /// written.
  private struct Entry: ~Copyable {
    let sequence = Atomic<UInt64>(0)
    let version = Atomic<UInt64>(0)
    let start = Atomic<UInt64>(0)
    let end = Atomic<UInt64>(0)
  }

  private static let entryCount = 16
  /// Addresses within 2 MiB share an entry; threads that use different memory rarely collide.
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
  ) throws(MooncakeError) -> Stretch {
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
  ) throws(MooncakeError) -> Stretch {
    // Read before the snapshot: at worst a newer entry carries an older version and is replaced
    // early.
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

  /// The stretch around `address`; followed at least up to `end` if it reaches that far.
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
  ) -> MooncakeError {
    let after = table.countBeginning(upTo: range.address)
    let isInside =
      after > 0
      && range.address &- table.buffers[after - 1].address < table.buffers[after - 1].length
    let buffer = table.buffers[isInside ? after - 1 : after]
    let end = String(buffer.address &+ buffer.length, radix: 16)
    let what =
      isInside ? "begins inside the registered buffer" : "runs into the registered buffer"
    return MooncakeError(
      .notRegistered,
      "request \(request): the local range \(BufferTable.describe(range)) \(what) "
        + "\(BufferTable.describe(buffer)), which ends at 0x\(end), and is only partly registered: "
        + "correct its length, or register all of it")
  }
}
