import MooncakeSystem
import Synchronization

/// Where a peer's process may still store data of writes that ended without its answer.
///
/// A connection that is given up leaves its last writes in the target's receive queue. The target
/// stores them when its server gets to them, perhaps after a later write to the same place has
/// completed on another connection. So their ranges are kept here, from before the end of such a
/// write is published until nothing of it can land, and no write that touches one is sent
/// meanwhile. There is one object for each process that is written to, shared by all connections to
/// it.
package final class UnfencedRanges: Sendable {
  package enum Verdict: Equatable, Sendable {
    case free
    /// The peer is expected to close the connection soon: wait.
    case pending
    /// It has not closed it in time: the write must not be sent.
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
    /// Endpoints that hold back writes.
    var waiting: [TCPEndpoint] = []
  }

  /// With so many connections that the peer has not closed, nothing is written to it.
  private static let entryLimit = 16

  private let state = Lock(State())
  private let count = Atomic<Int>(0)

  package init() {}

  package var isEmpty: Bool { count.load(ordering: .acquiring) == 0 }

  /// Adds the ranges of one connection's unanswered writes.
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

  /// Whether a write to a range may be sent. If it must wait, `endpoint` is scheduled at the next
  /// change.
  package func verdict(_ address: UInt64, _ length: Int, for endpoint: TCPEndpoint) -> Verdict {
    let range = address..<address &+ UInt64(length)
    return state.withLock { state in
      var verdict = Verdict.free
      let isFull = state.entries.count >= Self.entryLimit
      for entry in state.entries where isFull || entry.ranges.contains(where: range.overlaps) {
        if entry.isOverdue { return .overdue }
        verdict = .pending
      }
      if verdict == .pending, !state.waiting.contains(where: { $0 === endpoint }) {
        state.waiting.append(endpoint)
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
    for endpoint in waiting {
      endpoint.loop.schedule(endpoint)
      endpoint.loop.kick()
    }
  }
}
