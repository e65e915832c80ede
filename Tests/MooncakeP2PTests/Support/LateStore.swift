import MooncakeBase
import MooncakeMetadata
import MooncakeSystem

/// A real service as seen by a process whose puts are not answered and take effect only when the
/// test says so, as happens when the service, or one member of it, stalls.
final class LateStore: ForwardingService {
  private enum Put: Sendable {
    case always(MetadataEntry, MetadataLease?)
    case ifAbsent(MetadataEntry, MetadataLease?)
  }
  let service: any MetadataService
  private struct State {
    /// Applies to keys that contain this.
    var part: String?
    var held: [Put] = []
  }
  private let state = Lock(State())

  init(_ service: any MetadataService) { self.service = service }

  /// From now on, puts of keys that contain `part` are held back.
  func hold(_ part: String) { state.withLock { $0.part = part } }

  /// Puts take effect at once again, as do those that were held back. Returns how many those were.
  func deliver() -> Int {
    let held = state.withLock { state in
      defer { state = State() }
      return state.held
    }
    return held.count { put in
      switch put {
      case .always(let entry, let lease):
        (try? service.put(entry, lease: lease, testCall)) != nil
      case .ifAbsent(let entry, let lease):
        (try? service.putIfAbsent(entry, lease: lease, testCall)) == true
      }
    }
  }

  private func keepBack(_ key: String, _ put: Put) throws(MooncakeError) {
    let isHeld = state.withLock { state in
      guard let part = state.part, key.contains(part) else { return false }
      state.held.append(put)
      return true
    }
    if isHeld { throw MooncakeError(.timeout, "no answer") }
  }

  func put(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) {
    try keepBack(entry.key, .always(entry, lease))
    try service.put(entry, lease: lease, call)
  }

  func putIfAbsent(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) -> Bool {
    try keepBack(entry.key, .ifAbsent(entry, lease))
    return try service.putIfAbsent(entry, lease: lease, call)
  }
}
