import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// The memory that the holdings of one store have registered with its engine. Several holdings may
/// use the same ranges; they stay registered until the last one lets go.
///
/// A process of this host may be in the middle of a copy from or to memory that is let go, and may
/// have been stopped there. A caller waits for it within its own deadline and without holding a
/// lock. Memory that is still not free stays in the table as ending, and cannot be registered again
/// until it is.
final class MemoryTable: Sendable {
  private enum Use {
    case held(count: Int)
    /// The last holding has let go; `isAttended`: a call is waiting for peers.
    case ending(isAttended: Bool)
  }
  private struct Entry {
    var length: UInt64
    var access: Access
    var use = Use.held(count: 1)

    var isEnding: Bool {
      if case .ending = use { return true }
      return false
    }
  }
  private let engine: TransferEngine
  private let entries = Lock<[UInt64: Entry]>([:])
  /// Counts finished waits for peers.
  private let waits = Futex()

  /// Memory that is no longer a payload, but that a peer still has a grant to write into.
  private struct LateWrites {
    var buffers: [BufferLayout.Buffer]
    var end: UInt64
  }
  private let lateWrites = Lock<[LateWrites]>([])
  /// Memory of the engine that could not be freed because a peer may still touch it.
  private let unfreed = Lock<[UInt64]>([])

  /// For undoing a call that is over.
  private static var moment: Call {
    Call(until: .after(milliseconds: Bounds.momentMilliseconds))
  }
  /// A call that waits for another call's wait checks this often whether it was canceled.
  private static let tickMilliseconds: UInt64 = 50

  init(_ engine: TransferEngine) { self.engine = engine }

  // MARK: Registering

  /// Registers all buffers or none, and waits within the call until peers can find them. If a
  /// failed call cannot undo its registrations because a peer touches the memory, `ending` gets the
  /// addresses, for `finish`.
  func register(
    _ buffers: [BufferLayout.Buffer], location: String, access: Access, _ call: Call,
    leaving ending: inout [UInt64]
  ) throws(MooncakeError) {
    while true {
      let former = try enter(buffers, location: location, access: access)
      if former.isEmpty { break }
      try finish(former, call)
    }
    if access == .local { return }
    do throws(MooncakeError) {
      // Without the lock, or others would wait beyond their own deadlines.
      try engine.publishChanges(call)
    } catch {
      let message =
        "registering \(buffers.count) buffer(s), none is left registered: \(error.message)"
      let last = release(buffers)
      do throws(MooncakeError) { try finish(last, Self.moment) } catch {
        ending = last
        throw MooncakeError(error.code, "\(message); \(error.message)")
      }
      throw MooncakeError(error.code, message)
    }
  }

  /// Adds one use of each buffer; if some are still ending, changes nothing and returns those.
  private func enter(
    _ buffers: [BufferLayout.Buffer], location: String, access: Access
  ) throws(MooncakeError) -> [UInt64] {
    try entries.withLock { entries throws(MooncakeError) in
      let ending = Self.ending(entries, under: buffers)
      if !ending.isEmpty { return ending }
      var new: [(address: UInt64, length: UInt64)] = []
      var shared: [UInt64] = []
      for buffer in buffers {
        guard let entry = entries[buffer.address] else {
          new.append((buffer.address, buffer.length))
          continue
        }
        guard entry.length == buffer.length, entry.access == access else {
          throw MooncakeError(
            .overlap,
            "0x\(String(buffer.address, radix: 16)): another payload of this store has registered "
              + "\(entry.length) bytes there, not the same \(buffer.length) with the same access")
        }
        shared.append(buffer.address)
      }
      if !new.isEmpty { try engine.addBuffers(new, location: location, access: access) }
      for range in new { entries[range.address] = Entry(length: range.length, access: access) }
      for address in shared {
        if case .held(let count) = entries[address]!.use {
          entries[address]!.use = .held(count: count + 1)
        }
      }
      return []
    }
  }

  /// Addresses of ending ranges that share a byte with one of the buffers, wherever they begin.
  private static func ending(
    _ entries: [UInt64: Entry], under buffers: [BufferLayout.Buffer]
  ) -> [UInt64] {
    let all = entries.filter { $0.value.isEnding }.map {
      BufferLayout.Buffer(address: $0.key, length: $0.value.length)
    }
    if all.isEmpty || !BufferLayout.overlap(all, buffers) { return [] }
    return all.filter { BufferLayout.overlap([$0], buffers) }.map(\.address)
  }

  // MARK: Letting go

  /// Removes one use of each buffer; returns the addresses that no holding uses any more, for
  /// `finish`.
  func release(_ buffers: [BufferLayout.Buffer]) -> [UInt64] {
    entries.withLock { entries in
      var last: [UInt64] = []
      for buffer in buffers {
        guard case .held(let count) = entries[buffer.address]?.use else { continue }
        entries[buffer.address]!.use =
          count > 1 ? .held(count: count - 1) : .ending(isAttended: false)
        if count == 1 { last.append(buffer.address) }
      }
      return last
    }
  }

  /// Which of these addresses are let go while a peer may still touch the memory there.
  func ending(among addresses: [UInt64]) -> [UInt64] {
    entries.withLock { entries in addresses.filter { entries[$0]?.isEnding ?? false } }
  }

  /// Ends those of these addresses that are let go: when it returns, nobody reads or writes there.
  /// Throws BUSY if a peer is still in the middle of a copy when the call is over; they stay
  /// ending, and the next call tries again.
  func finish(_ addresses: [UInt64], _ call: Call) throws(MooncakeError) {
    while true {
      let seen = waits.value
      let (mine, isAttended) = attend(addresses)
      if !mine.isEmpty {
        try end(mine, call)
        retryFreeing(call)
      }
      if !isAttended { return }
      if call.isOver {
        throw MooncakeError(
          .busy,
          "another call is waiting for a process of this host that is copying this memory: keep "
            + "the memory, and call again")
      }
      waits.wait(
        while: seen, until: min(call.deadline, .after(milliseconds: Self.tickMilliseconds)))
    }
  }

  /// Claims the ending addresses that no other call attends to; also tells whether there are
  /// others.
  private func attend(_ addresses: [UInt64]) -> (mine: [UInt64], isAttended: Bool) {
    entries.withLock { entries in
      var mine: [UInt64] = []
      var isAttended = false
      for address in addresses {
        guard case .ending(let isTaken) = entries[address]?.use else { continue }
        if isTaken {
          isAttended = true
        } else {
          entries[address]!.use = .ending(isAttended: true)
          mine.append(address)
        }
      }
      return (mine, isAttended)
    }
  }

  private func end(_ addresses: [UInt64], _ call: Call) throws(MooncakeError) {
    var failure: MooncakeError?
    do throws(MooncakeError) { try engine.removeBuffers(addresses, call) } catch {
      // Other errors: the engine has closed, so nobody touches the memory, or has logged who does.
      if error.code == .busy { failure = error }
    }
    entries.withLock { entries in
      for address in addresses {
        if failure == nil {
          entries[address] = nil
        } else {
          entries[address]!.use = .ending(isAttended: false)
        }
      }
    }
    waits.increment()
    waits.wakeAll()
    if let failure { throw failure }
  }

  /// Frees memory of the engine now, or later if a peer may still touch it.
  func free(_ allocations: [UInt64], _ call: Call) {
    for address in allocations {
      let pointer = UnsafeMutableRawPointer(bitPattern: UInt(address))!
      do throws(MooncakeError) { try engine.free(pointer, publishing: call) } catch {
        if error.code == .busy { unfreed.withLock { $0.append(address) } }
      }
    }
  }

  private func retryFreeing(_ call: Call) {
    let addresses = unfreed.withLock { unfreed in
      defer { unfreed = [] }
      return unfreed
    }
    free(addresses, call)
  }

  // MARK: Late writes

  /// Peers with a grant may still write into these buffers, which are about to be let go, until
  /// `end`.
  func expectWrites(to buffers: [BufferLayout.Buffer], until end: UInt64) {
    let now = Clock.now()
    lateWrites.withLock { lateWrites in
      lateWrites.removeAll { $0.end <= now }
      if end > now { lateWrites.append(LateWrites(buffers: buffers, end: end)) }
    }
  }

  /// The time from which no peer with a grant for a former payload may write into these buffers; an
  /// earlier write would land in the new payload.
  func endOfLateWrites(to buffers: [BufferLayout.Buffer]) -> UInt64 {
    lateWrites.withLock { lateWrites in
      var end: UInt64 = 0
      for late in lateWrites where late.end > end {
        if BufferLayout.overlap(late.buffers, buffers) { end = late.end }
      }
      return end
    }
  }
}
