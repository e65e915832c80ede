import MooncakeBase
import MooncakeSystem
import Synchronization

/// The engine's own segment: what it publishes to peers.
package final class LocalSegment: Sendable {
  package let buffers = BufferTable()
  /// Checks the local side of requests.
  package let ranges: LocalRanges
  /// A descriptor without buffers; grows with each transport.
  private let identityBox: Lock<SegmentDescriptor>
  package let name: String

  private struct Published: Sendable {
    var version: UInt64 = 0
    var json = ""
    var metadataVersions = MetadataVersion()
  }
  private let published = Lock(Published())

  /// `identity` is a descriptor without buffers. A segment always starts empty.
  package init(identity: SegmentDescriptor) {
    name = identity.name
    identityBox = Lock(identity)
    ranges = LocalRanges(buffers)
  }

  private var identity: SegmentDescriptor { identityBox.withLock { $0 } }

  /// Changes what peers are told besides the buffers.
  package func changeIdentity(_ body: (inout SegmentDescriptor) -> Void) {
    identityBox.withLock { body(&$0) }
    buffers.noteChange()
  }

  /// The descriptor as peers may see it: buffers that grant nothing stay private.
  package var descriptor: SegmentDescriptor {
    var descriptor = identity
    descriptor.buffers = buffers.snapshot.buffers.filter { $0.access != .local }
    return descriptor
  }

  /// The descriptor's text, rebuilt only after a change.
  package var json: String {
    published.withLock { published in
      let version = buffers.version
      if version != published.version {
        var descriptor = descriptor
        descriptor.metadataVersion = published.metadataVersions.next()
        published.version = version
        published.json = descriptor.json()
        warnIfTooLong(published.json.utf8.count)
      }
      return published.json
    }
  }

  /// Gives the next text a higher version than the one another process published under this name.
  package func renewText(after other: UInt64) {
    published.withLock { published in
      published.metadataVersions.pass(other)
      published.version = 0
    }
  }

  /// Throws if the text no longer fits into one message to a peer: without a metadata service
  /// nobody could open the segment any more.
  package func checkFitsMessage() throws(MooncakeError) {
    let limit = HandshakeSettings.fromEnvironment().maximumLength
    let buffers = buffers.snapshot.buffers
    var writer = JSONWriter()
    writer.value(name)
    let nameByteCount = writer.text.utf8.count
    // A cheap upper bound: far below the limit, nothing needs counting.
    if (buffers.count + 16) * (nameByteCount + 96) < limit { return }
    let fixed = 128 + identity.json().utf8.count
    let count = buffers.reduce(into: fixed) { count, buffer in
      count += buffer.textByteCount(nameByteCount: nameByteCount)
    }
    if count < limit { return }
    throw MooncakeError(
      .full,
      "segment \(name): with \(buffers.count) buffers the descriptor would have \(count) bytes, "
        + "and peers take \(limit) in one message: register fewer and larger buffers, or raise "
        + "MC_HANDSHAKE_MAX_LENGTH on both sides")
  }

  private func warnIfTooLong(_ byteCount: Int) {
    let limit = HandshakeSettings.fromEnvironment().maximumLength
    if byteCount < limit { return }
    Log.warning(
      "segment \(name): the descriptor has \(byteCount) bytes, peers take \(limit): register fewer "
        + "and larger buffers, or raise MC_HANDSHAKE_MAX_LENGTH on both sides")
  }
}
