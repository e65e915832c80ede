import MooncakeBase
import MooncakeSystem

/// How long a call to a metadata service may take, and what ends it early.
package struct MetadataCall: Sendable {
  package let deadline: Deadline
  /// A descriptor that becomes readable when the call is to be given up; -1 for none.
  package let cancellation: Int32

  package init(until deadline: Deadline, cancellation: Int32 = -1) {
    self.deadline = deadline
    self.cancellation = cancellation
  }

  /// Waits for nothing: what it asks for is done in the background, or later.
  package static let background = MetadataCall(until: Deadline(nanoseconds: 0))

  /// Whether its time has passed or it was given up.
  package var isOver: Bool { deadline.hasPassed || Waiting.isReadable(cancellation) }

  /// The same call with less time.
  func within(milliseconds: UInt64) -> MetadataCall {
    MetadataCall(
      until: min(deadline, .after(milliseconds: milliseconds)), cancellation: cancellation)
  }
}

/// A key and what stands under it.
package struct MetadataEntry: Equatable, Sendable {
  package var key: String
  package var value: String

  package init(key: String, value: String) {
    self.key = key
    self.value = value
  }
}

/// What keys can hang on: without a sign of life of its owner for `ttlMilliseconds` they vanish.
package struct MetadataLease: Equatable, Sendable {
  /// The service's number for it; 0 where it is no object of its own.
  package let id: UInt64
  package let ttlMilliseconds: UInt64

  package init(id: UInt64, ttlMilliseconds: UInt64) {
    self.id = id
    self.ttlMilliseconds = ttlMilliseconds
  }
}

/// Part of a listing, in order of keys.
package struct MetadataPage: Sendable {
  package var entries: [MetadataEntry]
  /// The state that was listed: `changes` continues from here. 0 where the service counts none.
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

/// What a wait for changes brought.
package enum MetadataChanges: Sendable {
  /// In order, and up to which state; none if the deadline passed first.
  case changes([MetadataChange], revision: UInt64)
  /// The service cannot tell: list anew and compare.
  case unknown
}

/// What the renewal of a lease found.
package enum MetadataRenewal: Equatable, Sendable {
  /// All that was put stands.
  case kept
  /// These keys are gone, or somebody else's; the others stand.
  case lost([String])
  /// Nothing stands any more.
  case gone
}

/// A service that keeps texts under keys. Every call blocks, ends by its deadline and may be made
/// from any thread, several at once. An error names the service, the phase and the cause.
package protocol MetadataStore: AnyObject, Sendable {
  var uri: MetadataURI { get }

  /// nil if nothing stands there.
  func get(_ key: String, _ call: MetadataCall) throws(EngineError) -> String?

  /// What stands under each of many keys, in their order, in as few questions as it takes.
  func values(of keys: [String], _ call: MetadataCall) throws(EngineError) -> [String?]

  /// Replaces what stands there. Throws `notFound` if the lease is gone.
  func put(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: MetadataCall
  ) throws(EngineError)

  /// Returns false, and changes nothing, if something stands there.
  func putIfAbsent(
    _ entry: MetadataEntry, lease: MetadataLease?, _ call: MetadataCall
  ) throws(EngineError) -> Bool

  /// Returns whether something stood there.
  func delete(_ key: String, _ call: MetadataCall) throws(EngineError) -> Bool

  /// Keys from a prefix on, those after the key `position` if it is given; not more than `limit`,
  /// or than what the service gives at once.
  func list(
    prefix: String, from position: String?, limit: Int, _ call: MetadataCall
  ) throws(EngineError) -> MetadataPage

  /// Waits until keys with a prefix change after a state, or the deadline passes.
  func changes(
    prefix: String, since revision: UInt64, _ call: MetadataCall
  ) throws(EngineError) -> MetadataChanges

  /// Makes a lease; nil if the service has none.
  func grant(ttlMilliseconds: UInt64, _ call: MetadataCall) throws(EngineError) -> MetadataLease?

  /// Gives a lease its full time again and looks whether what was put still stands. Adds to
  /// `strays` what else hangs on the lease, where keys do: what has been put meanwhile, and what
  /// was put without an answer and has come after it was deleted.
  func renew(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], strays: inout [String],
    _ call: MetadataCall
  ) throws(EngineError) -> MetadataRenewal

  /// Ends a lease and removes what was put under it, but nothing that somebody else put since.
  func revoke(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], _ call: MetadataCall
  ) throws(EngineError)
}

extension MetadataStore {
  /// As above, for whoever has put nothing else under the lease.
  package func renew(
    _ lease: MetadataLease?, _ entries: [MetadataEntry], _ call: MetadataCall
  ) throws(EngineError) -> MetadataRenewal {
    var strays: [String] = []
    return try renew(lease, entries, strays: &strays, call)
  }

  /// Asks one by one.
  package func values(
    of keys: [String], _ call: MetadataCall
  ) throws(EngineError) -> [String?] {
    var values: [String?] = []
    for key in keys { values.append(try get(key, call)) }
    return values
  }

  /// As `listAll`, a page at a time, for what nobody needs to keep.
  package func forEach(
    prefix: String, _ call: MetadataCall,
    _ body: (MetadataEntry) throws(EngineError) -> Void
  ) throws(EngineError) {
    var position: String?
    repeat {
      let page = try list(prefix: prefix, from: position, limit: .max, call)
      for entry in page.entries { try body(entry) }
      position = page.next
    } while position != nil
  }

  /// Everything under a prefix, in order of keys.
  package func listAll(
    prefix: String, _ call: MetadataCall
  ) throws(EngineError) -> (entries: [MetadataEntry], revision: UInt64) {
    var page = try list(prefix: prefix, from: nil, limit: .max, call)
    // Changes between the pages are told again by `changes`, so the first state is what counts.
    let revision = page.revision
    var entries = page.entries
    while let next = page.next {
      page = try list(prefix: prefix, from: next, limit: .max, call)
      entries += page.entries
    }
    return (entries, revision)
  }

  /// An error of this service: where, in which phase, why, and what to do.
  func failure(
    _ code: EngineError.Code, _ phase: String, _ cause: String, _ remedy: String
  ) -> EngineError {
    EngineError(code, "metadata \(uri): \(phase): \(cause): \(remedy)")
  }
}

/// Opens stores by URI.
package enum MetadataStores {
  /// Does not connect yet, but loads the library that the service needs.
  package static func open(
    _ uri: MetadataURI, settings: MetadataSettings = .fromEnvironment()
  ) throws(EngineError) -> any MetadataStore {
    switch uri.service {
    case .http: try HTTPStore(uri, settings)
    case .etcd: try EtcdStore(uri, settings)
    case .redis: try RedisStore(uri, settings)
    case .peerToPeer:
      throw EngineError(
        .invalidArgument, "metadata \(uri): there is no service that keeps anything: name one")
    }
  }
}
