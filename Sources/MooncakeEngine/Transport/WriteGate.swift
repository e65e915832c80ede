import MooncakeSystem
import Synchronization

/// Holds back writes until a change of the gate.
package protocol WriteGateWaiter: AnyObject, Sendable {
  /// Look at what is held back; called once, from any thread.
  func gateChanged()
}

/// Where a peer's process may still store data of writes that ended without its answer.
///
/// A path that is given up leaves its last writes on the way: in the target's receive queue, or in
/// a fabric. They are stored when the target gets to them, perhaps after a later write to the same
/// place has completed on another path. So their ranges are kept here, from before the end of such
/// a write is published until nothing of it can land, and no write that touches one is sent
/// meanwhile. There is one object for each process that is written to, shared by all paths to it.
package final class WriteGate: Sendable {
  package enum Verdict: Equatable, Sendable {
    case free
    /// The target is expected to confirm soon that nothing lands any more: wait.
    case pending
    /// It has not in time: the write must not be sent.
    case overdue
  }

  private struct Entry {
    let id: UInt64
    let ranges: [Range<UInt64>]
    var isOverdue: Bool
  }

  private struct State {
    var entries: [Entry] = []
    var nextID: UInt64 = 1
    var waiting: [any WriteGateWaiter] = []
  }

  /// With so many entries nothing is written to the process.
  private static let entryLimit = 16

  private let state = Lock(State())
  private let count = Atomic<Int>(0)

  package init() {}

  @inline(__always)
  package var isEmpty: Bool { count.load(ordering: .acquiring) == 0 }

  /// Adds the ranges of one path's unanswered writes.
  package func add(_ ranges: [Range<UInt64>], isOverdue: Bool) -> UInt64 {
    state.withLock { state in
      let id = state.nextID
      state.nextID += 1
      state.entries.append(Entry(id: id, ranges: ranges, isOverdue: isOverdue))
      count.store(state.entries.count, ordering: .releasing)
      return id
    }
  }

  /// Removes an entry, because nothing of it can land any more.
  package func remove(_ id: UInt64) {
    change { state in
      state.entries.removeAll { $0.id == id }
      count.store(state.entries.count, ordering: .releasing)
    }
  }

  /// Makes writes to an entry's ranges fail instead of waiting.
  package func markOverdue(_ id: UInt64) {
    change { state in
      for index in state.entries.indices where state.entries[index].id == id {
        state.entries[index].isOverdue = true
      }
    }
  }

  /// Whether a write to a range may be sent. If it must wait, `waiter` is told of the next change.
  package func verdict(
    _ address: UInt64, _ length: Int, for waiter: any WriteGateWaiter
  ) -> Verdict {
    let range = address..<address &+ UInt64(length)
    return state.withLock { state in
      var verdict = Verdict.free
      let isFull = state.entries.count >= Self.entryLimit
      for entry in state.entries where isFull || entry.ranges.contains(where: range.overlaps) {
        if entry.isOverdue { return .overdue }
        verdict = .pending
      }
      if verdict == .pending, !state.waiting.contains(where: { $0 === waiter }) {
        state.waiting.append(waiter)
      }
      return verdict
    }
  }

  private func change(_ body: (inout State) -> Void) {
    let waiting = state.withLock { state in
      body(&state)
      defer { state.waiting = [] }
      return state.waiting
    }
    for waiter in waiting { waiter.gateChanged() }
  }
}

/// The gates of one engine, by the process that is written to. A gate outlives the paths to its
/// process: one that moved, or whose segment was closed and is opened again, has the same memory.
package final class WriteGates: Sendable {
  private struct Weak { weak var gate: WriteGate? }
  private let gates = Lock<[String: Weak]>([:])

  package init() {}

  /// The gate of the process that has published a descriptor. `address` stands for processes that
  /// do not tell who they are.
  package func gate(of descriptor: SegmentDescriptor, address: String) -> WriteGate {
    let process =
      descriptor.incarnation != 0 ? String(descriptor.incarnation, radix: 16) : address
    return gates.withLock { table in
      if let known = table[process]?.gate { return known }
      let new = WriteGate()
      table = table.filter { $0.value.gate != nil }
      table[process] = Weak(gate: new)
      return new
    }
  }
}
