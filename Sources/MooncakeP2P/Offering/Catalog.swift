import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// The payloads that one store holds, by name, and the names in use by a call: one call a name at a
/// time.
final class Catalog: Sendable {
  /// A payload in this process's memory.
  struct Entry: Sendable {
    var name: String
    var isOrigin: Bool
    /// nil: not offered to others.
    var holding: Holding?
    /// The memory as registered with the engine; nil once nothing is.
    var layout: BufferLayout?
    /// Memory that the store allocated, freed with the entry.
    var allocations: [UInt64] = []
    /// Whether it is listed for Mooncake's own store without being a holding.
    var isShared = false
    /// Memory no longer offered that a peer may still touch, because a copy has not ended.
    var ending: [UInt64] = []
  }

  private enum Slot {
    case busy
    case held(Entry)
  }
  private struct State {
    /// By the names' bytes: equal strings may be different names.
    var slots: [MetadataKey: Slot] = [:]
    var holdings: [UInt64: Holding] = [:]
    var isClosed = false
  }
  private let state = Lock(State())
  private let releases = Futex()

  /// Reserves, for a call, a name that this store does not hold.
  func reserve(_ name: String) throws(MooncakeError) {
    try state.withLock { state throws(MooncakeError) in
      if state.isClosed { throw Self.closed }
      switch state.slots[MetadataKey(name)] {
      case .none: state.slots[MetadataKey(name)] = .busy
      case .busy: throw Self.busy(name)
      case .held:
        throw MooncakeError(
          .exists,
          "payload '\(name)': this store already holds it: call unregister or delete "
            + "replica first")
      }
    }
  }

  /// Reserves a name for a call that registers it; returns the entry to replace, if this store
  /// registered one.
  func reserveReplacing(_ name: String) throws(MooncakeError) -> Entry? {
    try state.withLock { state throws(MooncakeError) in
      if state.isClosed { throw Self.closed }
      switch state.slots[MetadataKey(name)] {
      case .none:
        state.slots[MetadataKey(name)] = .busy
        return nil
      case .busy: throw Self.busy(name)
      case .held(let entry):
        if !entry.isOrigin {
          throw MooncakeError(
            .exists, "payload '\(name)': this store holds a replica of it: delete that first")
        }
        state.slots[MetadataKey(name)] = .busy
        return entry
      }
    }
  }

  /// Takes the entry of a name for a call that ends it; nil if there is no matching entry.
  func take(_ name: String, where matches: (Entry) -> Bool) throws(MooncakeError) -> Entry? {
    try state.withLock { state throws(MooncakeError) in
      if state.isClosed { throw Self.closed }
      switch state.slots[MetadataKey(name)] {
      case .none: return nil
      case .busy: throw Self.busy(name)
      case .held(let entry):
        guard matches(entry) else { return nil }
        state.slots[MetadataKey(name)] = .busy
        return entry
      }
    }
  }

  /// Ends a call that reserved a name; the store holds `entry` from now on, or nothing.
  func release(_ name: String, holding entry: Entry? = nil) {
    state.withLock { $0.slots[MetadataKey(name)] = entry.map { .held($0) } }
    releases.increment()
    releases.wakeAll()
  }

  /// Lets peers find a holding from now on.
  func open(_ holding: Holding) {
    state.withLock { $0.holdings[holding.address.holding] = holding }
  }

  func close(_ holding: Holding) { state.withLock { $0.holdings[holding.address.holding] = nil } }

  /// The holding with the number that a peer sent.
  func holding(_ number: UInt64) -> Holding? { state.withLock { $0.holdings[number] } }

  /// The holding of a name; nil while a call works on the name.
  func holding(of name: String) -> Holding? {
    state.withLock { state in
      if case .held(let entry) = state.slots[MetadataKey(name)] { return entry.holding }
      return nil
    }
  }

  var isClosed: Bool { state.withLock { $0.isClosed } }

  /// Refuses new calls; running ones end soon.
  func refuse() { state.withLock { $0.isClosed = true } }

  /// Refuses new calls, waits for running ones, and returns what is held.
  func close() -> [Entry] {
    refuse()
    while true {
      let seen = releases.value
      let entries: [Entry]? = state.withLock { state in
        var entries: [Entry] = []
        for slot in state.slots.values {
          guard case .held(let entry) = slot else { return nil }
          entries.append(entry)
        }
        state.slots = [:]
        return entries
      }
      if let entries { return entries }
      releases.wait(while: seen, until: .never)
    }
  }

  private static var closed: MooncakeError { MooncakeError(.invalidHandle, "the store was closed") }

  private static func busy(_ name: String) -> MooncakeError {
    MooncakeError(.busy, "payload '\(name)': another call of this store is using it")
  }
}
