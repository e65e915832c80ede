import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// A transport with the shape of RDMA over devices that are threads: completion queues, keys for
/// local and remote memory, and a path for each pair of devices.
package final class CQTransport: Transport, Sendable {
  package static let name = "cq"
  package static let deviceCount = 2

  /// The keys of a registered range, one for each device.
  struct Registration: Sendable {
    var range: RemoteBuffer
    var keys: [UInt32]
  }

  private struct State: Sendable {
    /// In order of address.
    var registrations: [Registration] = []
    /// No longer offered, but copied to or from when it was last looked at.
    var dying: [UInt32] = []

    /// Index of the first registration that begins at or after an address.
    func position(of address: UInt64) -> Int {
      var low = 0
      var high = registrations.count
      while low < high {
        let middle = (low + high) / 2
        if registrations[middle].range.address < address { low = middle + 1 } else { high = middle }
      }
      return low
    }

    /// The registration of exactly this range.
    func index(of range: RemoteBuffer) -> Int? {
      let position = position(of: range.address)
      let isFound = position < registrations.count && registrations[position].range == range
      return isFound ? position : nil
    }
  }

  package let verbs: FakeVerbs
  let poller: CQPoller
  private let buffers: BufferTable
  private let gates: WriteGates
  private let state = Lock(State())
  private let counters = CQCounters()

  package init(_ context: TransportContext) throws(MooncakeError) {
    buffers = context.buffers
    gates = context.gates
    do throws(Errno) {
      verbs = try FakeVerbs(deviceCount: Self.deviceCount)
    } catch {
      throw MooncakeError(.system, "completion queues are off: \(error)")
    }
    poller = CQPoller(verbs.completions, spinNanoseconds: context.spinNanoseconds)
    guard let bit = context.drivers.add(poller) else {
      verbs.stop()
      throw MooncakeError(.system, "completion queues are off: the engine has too many drivers")
    }
    do throws(Errno) { try poller.start(driverBit: bit) } catch {
      verbs.stop()
      throw MooncakeError(.system, "starting the poller of completion queues: \(error)")
    }
  }

  /// Makes it available under its name.
  package static let register: Void = TransportRegistry.add(
    TransportKind(name) { context throws(MooncakeError) in try CQTransport(context) })

  package var name: String { Self.name }

  package var describedBytesPerBuffer: Int { Self.deviceCount * CQSection.digitsPerKey }

  package func describe(in descriptor: inout SegmentDescriptor) {
    let published = descriptor.buffers.filter {
      !$0.access.isDisjoint(with: [.remoteRead, .remoteWrite])
    }
    // The text may be asked for before `offer` is called.
    register(published)
    let keys = state.withLock { state in
      published.flatMap { range in
        state.index(of: range).map { state.registrations[$0].keys }
          ?? [UInt32](repeating: 0, count: Self.deviceCount)
      }
    }
    descriptor.sections[Self.name] =
      CQSection(
        process: verbs.table.process, file: verbs.table.fileNumber,
        identity: verbs.table.identity, deviceCount: Self.deviceCount, keys: keys
      ).text
  }

  // MARK: Registrations

  package func offer(_ new: [BufferTable.Buffer]) { register(new.map(\.range)) }

  private func register(_ ranges: [RemoteBuffer]) {
    state.withLock { state in
      // Read under the lock: what is removed from the table afterwards is revoked after this.
      let table = buffers.snapshot
      for range in ranges where state.index(of: range) == nil {
        let index = table.find(range.address, range.length)
        if index >= 0, table.buffers[index] == range { insert(range, &state) }
      }
    }
  }

  private func insert(_ range: RemoteBuffer, _ state: inout State) {
    let position = state.position(of: range.address)
    // One that has gone, and whose revocation follows.
    if position < state.registrations.count,
      state.registrations[position].range.address == range.address
    {
      remove(position, &state)
    }
    state.registrations.insert(Registration(range: range, keys: makeKeys(range)), at: position)
  }

  private func remove(_ position: Int, _ state: inout State) {
    for key in state.registrations.remove(at: position).keys where key != 0 {
      verbs.table.invalidate(key)
      state.dying.append(key)
    }
  }

  package func revoke(_ removed: [BufferTable.Buffer], until call: Call) -> String? {
    state.withLock { state in
      for buffer in removed {
        if let index = state.index(of: buffer.range) { remove(index, &state) }
      }
    }
    // The same ranges may have been registered again meanwhile; they need new keys.
    let table = buffers.snapshot
    let again = removed.map(\.range).filter { range in
      let index = table.find(range.address, range.length)
      return index >= 0 && table.buffers[index] == range
    }
    if !again.isEmpty {
      register(again)
      buffers.noteChange()
    }
    while !hasEndedCopies() {
      if call.deadline.hasPassed || call.isCanceled { return "a device of a peer" }
      sleepBriefly(nanoseconds: 20_000)
    }
    return nil
  }

  /// Whether nothing that is no longer registered is still copied.
  private func hasEndedCopies() -> Bool {
    state.withLock { state in
      state.dying.removeAll { verbs.table.release($0) }
      return state.dying.isEmpty
    }
  }

  private func makeKeys(_ range: RemoteBuffer) -> [UInt32] {
    (0..<Self.deviceCount).map {
      verbs.registerRegion(range.address, range.length, range.access, on: $0).remoteKey
    }
  }

  /// A key for the local side of a work request, of a registration or for this request alone; 0 if
  /// there is none.
  func localKey(_ address: UInt64, _ length: UInt64, device: Int) -> (key: UInt32, isOwned: Bool) {
    let known = ownKey(address, length, device: device)
    if known != 0 { return (known, false) }
    return (verbs.registerRegion(address, length, .local, on: device).localKey, true)
  }

  /// Takes back a key that was made for one request, which has ended.
  func endLocalKey(_ key: UInt32) {
    verbs.table.invalidate(key)
    _ = verbs.table.release(key)
  }

  /// The key of registered memory of this engine; 0 if there is none.
  func ownKey(_ address: UInt64, _ length: UInt64, device: Int) -> UInt32 {
    state.withLock { state in
      let position = state.position(of: address &+ 1)
      guard position > 0, length > 0 else { return 0 }
      let registration = state.registrations[position - 1]
      let offset = address &- registration.range.address
      guard offset < registration.range.length, length <= registration.range.length &- offset
      else { return 0 }
      return registration.keys[device]
    }
  }

  // MARK: Paths

  /// A path for each pair of devices.
  package func connect(
    to descriptor: SegmentDescriptor, former: [any Path], for link: SegmentLink, deadline: Deadline
  ) throws(MooncakeError) -> [any Path] {
    guard let text = descriptor.sections[Self.name] else {
      throw MooncakeError(.unsupported, "the peer has no completion queues")
    }
    let section = try CQSection(parsing: text, bufferCount: descriptor.buffers.count)
    let keys = RemoteKeys(RangeTable(descriptor.buffers), section)
    let kept = former.compactMap { $0 as? CQPath }.filter { $0.identity == section.identity }
    if !kept.isEmpty {
      for path in kept { path.update(keys) }
      return kept
    }
    let isOwn = section.identity == verbs.table.identity
    let peer: FakeTable
    do throws(Errno) {
      peer =
        isOwn
        ? verbs.table
        : try FakeTable(of: section.process, file: section.file, identity: section.identity)
    } catch {
      throw MooncakeError(.unreachable, "the peer's devices cannot be reached: \(error)")
    }
    let gate = gates.gate(of: descriptor, address: "cq \(section.identity)")
    return (0..<min(Self.deviceCount, section.deviceCount)).map { index in
      let endpoint = CQEndpoint(
        device: verbs.devices[index], peer: peer, peerDevice: index, gate: gate, link: link,
        poller: poller, memory: self, counters: counters)
      return CQPath(endpoint, identity: section.identity, keys: isOwn ? nil : keys)
    }
  }

  package func stop(until deadline: Deadline) -> String? {
    poller.stop { verbs.stop() }
    return verbs.table.close(until: deadline) ? nil : "a device of a peer"
  }

  // MARK: Counters

  package var totals: TransportTotals { counters.totals }

  package var metrics: [TransportCounter] {
    [
      .init(
        "cq_queue_pair_failures", "Queue pairs that went into the error state.",
        counters.failures.load(ordering: .relaxed)),
      .init(
        "cq_registered_regions", "Regions that devices know.",
        UInt64(state.withLock { $0.registrations.count * Self.deviceCount }), kind: .gauge),
    ]
  }
}

/// Totals of an engine's transport.
final class CQCounters: Sendable {
  let failures = Atomic<UInt64>(0)
  private let read = Atomic<UInt64>(0)
  private let written = Atomic<UInt64>(0)
  private let completed = Atomic<UInt64>(0)
  private let failed = Atomic<UInt64>(0)

  func count(_ slice: SlicePointer, _ outcome: Outcome) {
    if outcome != .completed {
      failed.wrappingAdd(1, ordering: .relaxed)
      return
    }
    completed.wrappingAdd(1, ordering: .relaxed)
    let length = UInt64(slice.pointee.length)
    if slice.pointee.opcode == .read {
      read.wrappingAdd(length, ordering: .relaxed)
    } else {
      written.wrappingAdd(length, ordering: .relaxed)
    }
  }

  var totals: TransportTotals {
    var totals = TransportTotals()
    totals.readBytes = read.load(ordering: .relaxed)
    totals.writtenBytes = written.load(ordering: .relaxed)
    totals.completedSlices = completed.load(ordering: .relaxed)
    totals.failedSlices = failed.load(ordering: .relaxed)
    return totals
  }
}
