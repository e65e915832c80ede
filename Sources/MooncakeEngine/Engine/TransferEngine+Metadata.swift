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

  /// Tells the metadata service of changed registrations before the caller goes on to tell peers.
  func publishChanges() {
    publisher?.publishChanges(until: .after(milliseconds: Self.publicationMilliseconds))
  }

  /// Asks the metadata service, or without one the peer itself.
  func fetchDescriptor(
    _ name: String, deadline: Deadline
  ) throws(EngineError) -> SegmentDescriptor {
    if let directory {
      return try directory.descriptor(
        of: name, MetadataCall(until: deadline, cancellation: closeEvent.descriptor.rawValue))
    }
    return try RPCClient.fetchDescriptor(
      of: name, own: local.json, deadline: deadline,
      cancellation: closeEvent.descriptor.rawValue)
  }

  /// Where the RPC daemon of a segment's owner is, "host:port".
  func rpcAddress(of name: String, deadline: Deadline) throws(EngineError) -> String {
    if name == self.name { return rpcAddress.description }
    guard let directory else { return name }
    return try directory.route(
      to: name, MetadataCall(until: deadline, cancellation: closeEvent.descriptor.rawValue)
    ).description
  }
}
