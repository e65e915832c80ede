import MooncakeBase
import MooncakeMetadata
import MooncakeSystem

extension TransferEngine {
  /// Longest time that one change waits for the metadata service.
  private static let publicationMilliseconds: UInt64 = 10_000

  /// nil without a metadata service.
  static func openDirectory(_ options: Options) throws(EngineError) -> MetadataDirectory? {
    let uri = try MetadataURI(parsing: options.metadataURI)
    if uri.service == .peerToPeer { return nil }
    return try MetadataDirectory(uri)
  }

  /// Publishes the segment under its name; the ports listen by now.
  func startPublishing() throws(EngineError) {
    guard let publisher else { return }
    try MetadataDirectory.check(name)
    try publisher.start(
      until: min(deadline(0), .after(milliseconds: Self.publicationMilliseconds)))
  }

  /// Tells the metadata service of changed registrations before the caller goes on to tell peers,
  /// or, once `call` is over, in the background; without one the default timeout bounds it. Throws
  /// if peers will never hear of them.
  package func publishChanges(_ call: MetadataCall? = nil) throws(EngineError) {
    guard let publisher else { return try local.checkFitsMessage() }
    let limit = min(deadline(0), .after(milliseconds: Self.publicationMilliseconds))
    try publisher.publishChanges(
      MetadataCall(
        until: min(call?.deadline ?? limit, limit), cancellation: call?.cancellation ?? -1))
  }

  /// Asks the metadata service, or without one the peer itself. `known` is what it said before.
  func fetchDescriptor(
    _ name: String, known: SegmentDescriptor? = nil, deadline: Deadline
  ) throws(EngineError) -> SegmentDescriptor {
    guard let directory else { return try askPeer(name, deadline) }
    let fallback = known?.rpcAddress ?? ""
    do throws(EngineError) {
      // Half of the time is left for the peer.
      let left = deadline.remainingNanoseconds / 2_000_000
      return try directory.descriptor(
        of: name,
        MetadataCall(
          until: fallback.isEmpty ? deadline : min(deadline, .after(milliseconds: left)),
          cancellation: closeEvent.descriptor.rawValue))
    } catch {
      // A service that is away keeps nobody from those it has found before.
      let isAway = [.unreachable, .timeout, .unresolved].contains(error.code)
      guard isAway, !fallback.isEmpty, let descriptor = try? askPeer(fallback, deadline),
        descriptor.name == known?.name, descriptor.incarnation == known?.incarnation
      else { throw error }
      return descriptor
    }
  }

  private func askPeer(
    _ address: String, _ deadline: Deadline
  ) throws(EngineError) -> SegmentDescriptor {
    try RPCClient.fetchDescriptor(
      of: address, own: local.json, deadline: deadline,
      cancellation: closeEvent.descriptor.rawValue)
  }

  /// Where the RPC daemon of a segment's owner is, "host:port".
  func rpcAddress(of name: String, deadline: Deadline) throws(EngineError) -> String {
    if isOwn(name) { return rpcAddress.description }
    guard let directory else { return name }
    return try directory.route(
      to: name, MetadataCall(until: deadline, cancellation: closeEvent.descriptor.rawValue)
    ).description
  }
}
