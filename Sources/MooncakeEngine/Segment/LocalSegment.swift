import MooncakeSystem
import Synchronization

/// The engine's own segment: what it publishes to peers.
package final class LocalSegment: Sendable {
  package let buffers = BufferTable()
  /// What the local side of requests is checked against.
  package let ranges: LocalRanges
  private let identity: SegmentDescriptor

  private struct Published: Sendable {
    var version: UInt64 = 0
    var json = ""
  }
  private let published = Lock(Published())

  /// `identity` is a descriptor without buffers. A segment always starts empty.
  package init(identity: SegmentDescriptor) {
    self.identity = identity
    ranges = LocalRanges(buffers)
  }

  package var name: String { identity.name }

  /// The descriptor as peers may see it: buffers that grant nothing stay private.
  package var descriptor: SegmentDescriptor {
    var descriptor = identity
    descriptor.buffers = buffers.snapshot.buffers.filter { $0.access != .local }
    return descriptor
  }

  /// The descriptor's text, made anew only after a change.
  package var json: String {
    published.withLock { published in
      let version = buffers.version
      if version != published.version {
        published = Published(version: version, json: descriptor.json())
        warnIfTooLong(published.json.utf8.count)
      }
      return published.json
    }
  }

  private func warnIfTooLong(_ byteCount: Int) {
    let limit = HandshakeSettings.fromEnvironment().maximumLength
    if byteCount < limit { return }
    Log.warning(
      "segment \(name): the descriptor has \(byteCount) bytes, peers take \(limit): register fewer "
        + "and larger buffers, or raise MC_HANDSHAKE_MAX_LENGTH on both sides")
  }
}
