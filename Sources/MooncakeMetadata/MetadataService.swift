import MooncakeBase
import MooncakeSystem

/// A key and its value.
package struct MetadataEntry: Equatable, Sendable {
  package var key: String
  package var value: String

  package init(key: String, value: String) {
    self.key = key
    self.value = value
  }
}

/// A value and the revision that wrote it: every write of the key gets another one.
package struct RevisedValue: Equatable, Sendable {
  package var value: String
  /// Never 0.
  package var revision: UInt64

  package init(_ value: String, revision: UInt64) {
    self.value = value
    self.revision = revision
  }
}

/// A lease: the service removes its keys if the owner does not renew it for `ttlMilliseconds`.
package struct MetadataLease: Equatable, Sendable {
  /// The service's number for it; 0 if the service has no lease objects.
  package let id: UInt64
  package let ttlMilliseconds: UInt64

  package init(id: UInt64, ttlMilliseconds: UInt64) {
    self.id = id
    self.ttlMilliseconds = ttlMilliseconds
  }
}

/// Part of a listing, ordered by key.
package struct MetadataPage: Sendable {
  package var entries: [MetadataEntry]
  /// The revision that was listed, from which `changes` continues; 0 if the service has none.
  package var revision: UInt64
  /// Where the next page begins; nil for the last one.
  package var next: String?

  package init(entries: [MetadataEntry], revision: UInt64, next: String?) {
    self.entries = entries
    self.revision = revision
    self.next = next
  }
}

/// One key that changed.
package enum MetadataChange: Equatable, Sendable {
  case put(MetadataEntry)
  case delete(key: String)

  package var key: String {
    switch self {
    case .put(let entry): entry.key
    case .delete(let key): key
    }
  }
}

/// The result of waiting for changes.
package enum MetadataChanges: Sendable {
  /// The changes in order, and the revision they lead to; none if the deadline passed first.
  case changes([MetadataChange], revision: UInt64)
  /// The service cannot tell; list again and compare.
  case unknown
}

/// The result of renewing a lease.
package enum MetadataRenewal: Equatable, Sendable {
  /// All entries are still there.
  case kept
  /// These keys are gone or somebody else's; the others are still there.
  case lost([String])
  /// No entry is left.
  case gone
}

/// A service that stores texts under keys. Every call blocks, ends by its deadline and may be made
/// from several threads at once. Errors name the service, the phase and the cause.
package protocol MetadataService: AnyObject, Sendable {
  var uri: MetadataURI { get }

  /// nil if the key does not exist.
  func get(_ key: String, _ call: Call) throws(MooncakeError) -> String?

  /// The values of many keys, in their order, in as few requests as possible.
  func values(of keys: [String], _ call: Call) throws(MooncakeError) -> [String?]

  /// Puts an entry, replacing any value. Throws `notFound` if the lease is gone.
  func put(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError)

  /// Puts an entry if its key does not exist; otherwise returns false and changes nothing.
  func putIfAbsent(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: Call
  ) throws(MooncakeError) -> Bool

  /// Deletes a key; returns whether it existed.
  func delete(_ key: String, _ call: Call) throws(MooncakeError) -> Bool

  /// Entries with a prefix, after the key `position` if given; at most `limit`, or as many as the
  /// service gives at once.
  func list(
    prefix: String, from position: String?, limit: Int, _ call: Call
  ) throws(MooncakeError) -> MetadataPage

  /// Whether a listing costs time for every key of the service, not only for those listed.
  var listingScansAllKeys: Bool { get }

  /// Whether the service tells which revision wrote a value, and replaces it on condition that
  /// nothing has been written since. Where not, `getRevised` and `replace` throw `unsupported`, and
  /// only `putIfAbsent` and `revoke` have a condition.
  var comparesRevisions: Bool { get }

  /// A value with its revision; nil if the key does not exist. `isText`: a value that is not UTF-8
  /// is an error, instead of being repaired.
  func getRevised(
    _ key: String, isText: Bool, _ call: Call
  ) throws(MooncakeError) -> RevisedValue?

  /// Puts a value, or deletes the key if it is nil, provided that the key was last written by
  /// `revision` (0 if it does not exist). Otherwise returns false and changes nothing. A value that
  /// is put belongs to no lease.
  func replace(
    _ key: String, writtenBy revision: UInt64, with value: String?, _ call: Call
  ) throws(MooncakeError) -> Bool

  /// Waits until keys with a prefix change after a revision, or the deadline passes.
  func changes(
    prefix: String, since revision: UInt64, _ call: Call
  ) throws(MooncakeError) -> MetadataChanges

  /// Creates a lease; nil if the service has no leases.
  func grant(ttlMilliseconds: UInt64, _ call: Call) throws(MooncakeError) -> MetadataLease?

  /// Gives a lease its full time again and checks whether its entries are still there. If the
  /// service attaches keys to leases, adds to `strays` the other keys of the lease: those put
  /// meanwhile, and those whose put got no answer and took effect after they were deleted.
  func renew(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], strays: inout [String],
    _ call: Call
  ) throws(MooncakeError) -> MetadataRenewal

  /// Ends a lease and removes its entries, except those that somebody else has put since.
  func revoke(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], _ call: Call
  ) throws(MooncakeError)
}

extension MetadataService {
  /// As above, for callers that have put nothing else under the lease.
  package func renew(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], _ call: Call
  ) throws(MooncakeError) -> MetadataRenewal {
    var strays: [String] = []
    return try renew(lease, entries, strays: &strays, call)
  }

  /// Reads them one by one.
  package func values(
    of keys: [String], _ call: Call
  ) throws(MooncakeError) -> [String?] {
    var values: [String?] = []
    for key in keys { values.append(try get(key, call)) }
    return values
  }

  /// For services that do not compare revisions.
  package func getRevised(
    _ key: String, isText: Bool, _ call: Call
  ) throws(MooncakeError) -> RevisedValue? {
    throw withoutRevisions("get '\(key)' with its revision")
  }

  /// For services that do not compare revisions.
  package func replace(
    _ key: String, writtenBy revision: UInt64, with value: String?, _ call: Call
  ) throws(MooncakeError) -> Bool {
    throw withoutRevisions("\(value == nil ? "delete" : "put") '\(key)' if unchanged")
  }

  private func withoutRevisions(_ phase: String) -> MooncakeError {
    failure(.unsupported, phase, "this service does not compare revisions", "use etcd")
  }

  /// A text with its revision.
  package func getRevised(_ key: String, _ call: Call) throws(MooncakeError) -> RevisedValue? {
    try getRevised(key, isText: true, call)
  }

  /// As `listAll`, but one page at a time, for callers that do not keep the entries.
  package func forEach(
    prefix: String, _ call: Call,
    _ body: (MetadataEntry) throws(MooncakeError) -> Void
  ) throws(MooncakeError) {
    var position: String?
    repeat {
      let page = try list(prefix: prefix, from: position, limit: .max, call)
      for entry in page.entries { try body(entry) }
      position = page.next
    } while position != nil
  }

  /// Everything under a prefix, ordered by key.
  package func listAll(
    prefix: String, _ call: Call
  ) throws(MooncakeError) -> (entries: [MetadataEntry], revision: UInt64) {
    var page = try list(prefix: prefix, from: nil, limit: .max, call)
    // Keep the first page's revision: `changes` then repeats whatever changed between pages.
    let revision = page.revision
    var entries = page.entries
    while let next = page.next {
      page = try list(prefix: prefix, from: next, limit: .max, call)
      entries += page.entries
    }
    return (entries, revision)
  }

  /// An error of this service: where, in which phase, why, and what to do about it.
  func failure(
    _ code: MooncakeError.Code, _ phase: String, _ cause: String, _ remedy: String
  ) -> MooncakeError {
    MooncakeError(code, "metadata \(uri): \(phase): \(cause): \(remedy)")
  }
}

/// Opens services by URI.
package enum MetadataServices {
  /// Loads the library that the service needs, but does not connect yet.
  package static func open(
    _ uri: MetadataURI, settings: MetadataSettings = .fromEnvironment()
  ) throws(MooncakeError) -> any MetadataService {
    switch uri.service {
    case .http: try HTTPService(uri, settings)
    case .etcd: try EtcdService(uri, settings)
    case .redis: try RedisService(uri, settings)
    case .peerToPeer:
      throw MooncakeError(
        .invalidArgument, "metadata \(uri): this needs a metadata service: name one")
    }
  }
}
