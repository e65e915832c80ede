import MooncakeBase
import MooncakeMetadata

/// A service that passes calls on to another one, except those that it declares itself.
protocol ForwardingService: MetadataService {
  var service: any MetadataService { get }
}

extension ForwardingService {
  var uri: MetadataURI { service.uri }
  var listingScansAllKeys: Bool { service.listingScansAllKeys }
  var comparesRevisions: Bool { service.comparesRevisions }

  func get(_ key: String, _ call: Call) throws(MooncakeError) -> String? {
    try service.get(key, call)
  }

  func values(of keys: [String], _ call: Call) throws(MooncakeError) -> [String?] {
    try service.values(of: keys, call)
  }

  func put(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) {
    try service.put(entry, lease: lease, call)
  }

  func putIfAbsent(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) -> Bool {
    try service.putIfAbsent(entry, lease: lease, call)
  }

  func delete(_ key: String, _ call: Call) throws(MooncakeError) -> Bool {
    try service.delete(key, call)
  }

  func list(
    prefix: String, from position: String?, limit: Int, _ call: Call
  ) throws(MooncakeError) -> MetadataPage {
    try service.list(prefix: prefix, from: position, limit: limit, call)
  }

  func getRevised(
    _ key: String, isText: Bool, _ call: Call
  ) throws(MooncakeError) -> RevisedValue? {
    try service.getRevised(key, isText: isText, call)
  }

  func replace(
    _ key: String, writtenBy revision: UInt64, with value: String?, _ call: Call
  ) throws(MooncakeError) -> Bool {
    try service.replace(key, writtenBy: revision, with: value, call)
  }

  func changes(
    prefix: String, since revision: UInt64, _ call: Call
  ) throws(MooncakeError) -> MetadataChanges {
    try service.changes(prefix: prefix, since: revision, call)
  }

  func grant(ttlMilliseconds: UInt64, _ call: Call) throws(MooncakeError) -> MetadataLease? {
    try service.grant(ttlMilliseconds: ttlMilliseconds, call)
  }

  func renew(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], strays: inout [String],
    _ call: Call
  ) throws(MooncakeError) -> MetadataRenewal {
    try service.renew(lease, entries, strays: &strays, call)
  }

  func revoke(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], _ call: Call
  ) throws(MooncakeError) {
    try service.revoke(lease, entries, call)
  }
}
