import MooncakeEngine

/// Who may touch which memory when, and what it must hold. Everything that fakes do with memory
/// passes through here.
///
/// Orders count submits, stores and ends, so that what happens at the same virtual time is told
/// apart.
final class MemoryModel {
  struct Request {
    let batch: Batch
    let index: Int
    let opcode: Opcode
    let peer: Int
    let local: Range<Int>
    let remote: Range<Int>
    let submitted: Int
    let submitTime: UInt64
    let deadline: UInt64
    var canceled = UInt64.max
    var ended = Int.max
    var outcome = Outcome.waiting

    var isCompletedWrite: Bool { opcode == .write && outcome == .completed }
  }

  private(set) var requests: [Request] = []
  private var live: [Int] = []
  private var local: [UInt64] = []
  /// The request that a cell of local memory belongs to.
  private var owners: [Int] = []
  /// The lives of each peer.
  var processes: [[FakeProcess]] = []
  private(set) var violations: [String] = []
  private(set) var order = 0
  /// How late a batch may end after its deadline or cancellation.
  let lateness: UInt64

  init(lateness: UInt64) { self.lateness = lateness }

  func fail(_ text: String) {
    if violations.count < 8 { violations.append(text) }
  }

  private func nextOrder() -> Int {
    order += 1
    return order
  }

  // MARK: Requests

  /// Gives a request memory of its own; a write's is filled with numbers that occur once.
  func reserve(_ count: Int) -> Range<Int> {
    let first = local.count
    for cell in first..<first + count { local.append(1 << 60 | UInt64(cell)) }
    owners += Array(repeating: requests.count, count: count)
    return first..<first + count
  }

  /// Notes a request right before its submit.
  func add(_ request: Request) -> Int {
    requests.append(request)
    live.append(requests.count - 1)
    return requests.count - 1
  }

  /// Forgets requests whose submit was refused as a whole.
  func removeLast(_ count: Int) {
    let kept = requests.count - count
    requests.removeLast(count)
    live.removeAll { $0 >= kept }
  }

  func makeOrder() -> Int { nextOrder() }

  func noteCancel(_ batch: Batch, _ now: UInt64) {
    for number in live where requests[number].batch === batch {
      requests[number].canceled = min(requests[number].canceled, now)
    }
  }

  func request(of slice: SlicePointer) -> Int {
    let address = UInt64(UInt(bitPattern: slice.pointee.local))
    return owners[Int(address - Cells.localBase) / Cells.bytes]
  }

  func localCells(of slice: SlicePointer) -> Range<Int> {
    let address = UInt64(UInt(bitPattern: slice.pointee.local))
    let first = Int(address - Cells.localBase) / Cells.bytes
    return first..<first + slice.pointee.length / Cells.bytes
  }

  private func hasEnded(_ number: Int) -> Bool {
    let request = requests[number]
    return request.batch.tasks[request.index].outcome != .waiting
  }

  // MARK: Touching memory

  /// A path reads what a write sends.
  func take(_ number: Int, _ cells: Range<Int>) -> [UInt64] {
    if hasEnded(number) { fail("request \(number) is sent after its end") }
    return Array(local[cells])
  }

  /// What a read has fetched arrives.
  func arrive(_ flight: FakeFlight) {
    if hasEnded(flight.request) {
      fail("request \(flight.request): local memory changes after its end")
    }
    for (cell, value) in zip(flight.local, flight.values) { local[cell] = value }
  }

  /// A write reaches the target's memory.
  func land(_ flight: FakeFlight, in process: FakeProcess) {
    let request = requests[flight.request]
    let outcome = request.batch.tasks[request.index].outcome
    if outcome == .completed {
      fail("request \(flight.request): the target changes after it has completed")
    } else if outcome != .waiting && !flight.isGated {
      fail("request \(flight.request): the target changes after its end, without a gate")
    }
    for (cell, value) in zip(flight.remote, flight.values) {
      if request.ended != .max {
        for (later, other) in requests.enumerated()
        where other.isCompletedWrite && request.ended < other.submitted
          && process.stores[cell].contains(where: { $0.request == later })
        {
          fail("request \(flight.request) overwrites request \(later), which is later, in \(cell)")
        }
      }
      process.store(value, in: cell, of: flight.request, order: nextOrder())
    }
  }

  /// A path is about to send a slice.
  func noteSend(_ flight: FakeFlight, to process: FakeProcess) {
    if flight.opcode == .read { return }
    for other in process.unfenced
    where other.request == flight.request && other.remote.overlaps(flight.remote)
      && !other.isDropped && !other.hasLanded
    {
      fail("request \(flight.request) is sent again while it may still land")
    }
  }

  // MARK: Checks after each event

  func check(_ now: UInt64) {
    var isAnyEnded = false
    for number in live {
      if hasEnded(number) {
        isAnyEnded = true
        end(number)
      } else {
        let request = requests[number]
        let due = min(request.deadline, request.canceled)
        if due < now &- lateness {
          fail("request \(number) has not ended \((now - due) / 1000) us after it was due")
        }
      }
    }
    if isAnyEnded { live.removeAll { requests[$0].ended != .max } }
  }

  var isQuiet: Bool { live.isEmpty }

  private func end(_ number: Int) {
    let request = requests[number]
    let status = request.batch.status(of: request.index)
    requests[number].ended = nextOrder()
    requests[number].outcome = request.batch.tasks[request.index].outcome
    let byteCount = UInt64(request.remote.count * Cells.bytes)
    guard requests[number].outcome == .completed else {
      if status.transferredBytes > byteCount {
        fail("request \(number) failed with more bytes than it has")
      }
      return
    }
    if status.transferredBytes != byteCount {
      fail("request \(number) completed with \(status.transferredBytes) of \(byteCount) bytes")
    }
    let isRight = processes[request.peer].contains {
      request.opcode == .read ? holdsFetched(number, of: $0) : holdsWritten(number, $0)
    }
    if !isRight {
      let what =
        request.opcode == .read
        ? "fetched what the target never held meanwhile" : "is not wholly in the target's memory"
      fail("request \(number), a \(request.opcode), completed and \(what)")
    }
  }

  /// Whether each cell of a read had its value at some moment of the request.
  private func holdsFetched(_ number: Int, of process: FakeProcess) -> Bool {
    let request = requests[number]
    for (mine, theirs) in zip(request.local, request.remote) {
      let stores = process.stores[theirs]
      let isKnown = stores.indices.contains { index in
        stores[index].value == local[mine]
          && (index + 1 == stores.count || stores[index + 1].order > request.submitted)
      }
      if !isKnown { return false }
    }
    return true
  }

  /// Whether each cell of a write was stored, and nothing was stored over it that had ended before.
  private func holdsWritten(_ number: Int, _ process: FakeProcess) -> Bool {
    let request = requests[number]
    for (mine, theirs) in zip(request.local, request.remote) {
      let stores = process.stores[theirs]
      guard let index = stores.lastIndex(where: { $0.request == number }),
        stores[index].value == local[mine]
      else { return false }
      for later in stores[(index + 1)...]
      where later.request >= 0 && requests[later.request].ended < request.submitted {
        fail("request \(number) completed, overwritten by the earlier \(later.request)")
      }
    }
    return true
  }
}
