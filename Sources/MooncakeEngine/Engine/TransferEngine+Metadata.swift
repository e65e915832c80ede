import MooncakeBase
import MooncakeMetadata
import MooncakeSystem

extension TransferEngine {
  /// Longest time that one change waits for the metadata service.
  private static let publicationMilliseconds: UInt64 = 10_000

  /// nil without a metadata service.
  static func openDirectory(_ options: Options) throws(MooncakeError) -> MetadataDirectory? {
    let uri = try MetadataURI(parsing: options.metadataURI)
    if uri.service == .peerToPeer { return nil }
    return try MetadataDirectory(uri)
  }

  /// Publishes the segment under its name; its ports already listen.
  func startPublishing() throws(MooncakeError) {
    guard let publisher else { return }
    try MetadataDirectory.check(name)
    try publisher.start(
      until: min(deadline(0), .after(milliseconds: Self.publicationMilliseconds)))
  }

  /// Publishes changed registrations and waits until it is done, so that the caller can then tell
  /// peers. Once `call` (nil: the default timeout) is over, publishing goes on in the background.
  /// Throws if peers will never learn of them: the metadata service refuses for good, or, without
  /// one, the descriptor no longer fits a message.
  package func publishChanges(_ call: Call? = nil) throws(MooncakeError) {
    guard let publisher else { return try local.checkFitsMessage() }
    let limit = min(deadline(0), .after(milliseconds: Self.publicationMilliseconds))
    try publisher.publishChanges((call ?? Call(until: limit)).within(limit))
  }

  /// Asks the metadata service, or without one the peer itself. `known` is the previous descriptor.
  func fetchDescriptor(
    _ name: String, known: SegmentDescriptor? = nil, _ call: Call
  ) throws(MooncakeError) -> SegmentDescriptor {
    guard let directory else { return try askPeer(name, call) }
    let fallback = known?.rpcAddress ?? ""
    do throws(MooncakeError) {
      // Leave half of the time for asking the peer.
      let half = call.deadline.remainingNanoseconds / 2_000_000
      return try directory.descriptor(
        of: name, fallback.isEmpty ? call : call.within(milliseconds: half))
    } catch {
      // If the service is unreachable, peers found before can still be asked directly.
      let isAway = [.unreachable, .timeout, .unresolved].contains(error.code)
      guard isAway, !fallback.isEmpty, let descriptor = try? askPeer(fallback, call),
        descriptor.name == known?.name, descriptor.incarnation == known?.incarnation
      else { throw error }
      return descriptor
    }
  }

  private func askPeer(
    _ address: String, _ call: Call
  ) throws(MooncakeError) -> SegmentDescriptor {
    try RPCClient.fetchDescriptor(of: address, own: local.json, call)
  }

  /// The address of the RPC daemon of a segment's owner, "host:port".
  func rpcAddress(of name: String, _ call: Call) throws(MooncakeError) -> String {
    if isOwn(name) { return rpcAddress.description }
    guard let directory else { return name }
    return try directory.route(to: name, call).description
  }

  /// A call that ends when the engine closes, if not before.
  func call(until deadline: Deadline) -> Call {
    Call(until: deadline, cancellation: closeEvent.descriptor.rawValue)
  }
}
