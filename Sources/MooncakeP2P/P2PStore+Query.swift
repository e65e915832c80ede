import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

extension P2PStore {
  /// What readers see of a payload that this store offers, and how much they have read.
  package func readers(of name: String) -> Holding? { catalog.holding(of: name) }

  /// Messages about entries of the metadata service that this store could not read.
  package var passedOver: [String] { directory.passedOver }

  /// Payloads whose names begin with a prefix, in order, with sizes and numbers of holders. If
  /// Mooncake's own store uses the same etcd, its payloads are included.
  public func list(
    prefix: String, _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) -> [PayloadInfo] {
    let bounds = queryBounds("listing payloads '\(prefix)'", operation)
    try bounds.check("start")
    let payloads = try directory.list(prefix: prefix, bounds.call)
    guard let shared else { return payloads }
    let known = Set(payloads.map { MetadataKey($0.name) })
    let others = try shared.list(prefix: prefix, bounds.call).filter {
      !known.contains(MetadataKey($0.name))
    }
    return (payloads + others).sorted { MetadataKey($0.name) < MetadataKey($1.name) }
  }

  /// What is known of a payload, including the length of each buffer, and who offers it.
  public func describe(
    _ name: String, _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) -> (info: PayloadInfo, holders: [PayloadHolder]) {
    let bounds = queryBounds("describing payload '\(name)'", operation)
    try PayloadName.check(name)
    try bounds.check("start")
    guard let target = try locate(name, GetOptions(), bounds) else {
      guard let document = try shared?.document(name, bounds.call) else { throw notFound(name) }
      return (document.info, document.holders)
    }
    let all = try directory.allHolders(of: name, limit: .max, bounds.call)
    let holders = all.filter { $0.version == target.version }
    var info = target.summary.info(holderCount: UInt64(holders.count))
    if let manifest = try? manifest(of: target, bounds).manifest {
      info.bufferSizes = manifest.layout.bufferSizes
    }
    return (info, all.map(\.payloadHolder))
  }

  /// Reports payloads whose names begin with a prefix: first those that exist, then each one that
  /// appears, gets another version, or vanishes. The handler runs on the watch's thread, and never
  /// again once the watch has been stopped or the store closed.
  public func watch(
    prefix: String, _ handler: @escaping @Sendable (PayloadChange) -> Void
  ) throws(MooncakeError) -> PayloadWatch {
    try PayloadWatch(directory, prefix: prefix, of: watches, handler)
  }

  private func queryBounds(_ what: String, _ operation: StoreOperation) -> Bounds {
    bounds(operation, what, defaultMilliseconds: engine.defaultTimeoutMilliseconds)
  }
}
