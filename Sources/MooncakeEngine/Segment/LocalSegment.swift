import MooncakeBase
import MooncakeSystem
import Synchronization

/// The engine's own segment: what it publishes to peers.
package final class LocalSegment: Sendable {
  package let buffers = BufferTable()
  /// Checks the local side of requests.
  package let ranges: LocalRanges
  /// A descriptor without buffers.
  private let identity: SegmentDescriptor
  /// What each transport adds to it.
  package struct Describer: Sendable {
    /// Most bytes that it adds to the text for each buffer.
    package var bytesPerBuffer: Int
    package var describe: @Sendable (inout SegmentDescriptor) -> Void

    package init(
      bytesPerBuffer: Int = 0, _ describe: @escaping @Sendable (inout SegmentDescriptor) -> Void
    ) {
      self.bytesPerBuffer = bytesPerBuffer
      self.describe = describe
    }
  }
  private let describers = Lock<[Describer]>([])
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
    self.identity = identity
    ranges = LocalRanges(buffers)
  }

  /// Adds what peers are told besides the buffers. It runs whenever these have changed, after they
  /// are listed.
  package func add(_ describer: Describer) {
    describers.withLock { $0.append(describer) }
    buffers.noteChange()
  }

  /// The descriptor as peers may see it: buffers that grant nothing stay private.
  package var descriptor: SegmentDescriptor {
    described(buffers.snapshot.buffers.filter { $0.access != .local })
  }

  private func described(
    _ buffers: [RemoteBuffer], by more: [Describer] = []
  ) -> SegmentDescriptor {
    var descriptor = identity
    descriptor.buffers = buffers
    for describer in describers.withLock({ $0 }) + more { describer.describe(&descriptor) }
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
  /// nobody could open the segment any more. `more`: what is about to be added.
  package func checkFitsMessage(with more: [Describer] = []) throws(MooncakeError) {
    let limit = HandshakeSettings.fromEnvironment().maximumLength
    let buffers = buffers.snapshot.buffers
    var writer = JSONWriter()
    writer.value(name)
    let nameByteCount = writer.text.utf8.count
    // A cheap upper bound: far below the limit, nothing needs counting.
    let extra = (describers.withLock { $0 } + more).reduce(0) { $0 + $1.bytesPerBuffer }
    let fixed = 128 + described([], by: more).json().utf8.count
    if fixed + (buffers.count + 16) * (nameByteCount + 96 + extra) < limit { return }
    let count = buffers.reduce(into: fixed) { count, buffer in
      let byteCount = buffer.textByteCount(nameByteCount: nameByteCount)
      if byteCount > 0 { count += byteCount + extra }
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
