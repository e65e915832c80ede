import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

/// The documents about payloads and their holders that this store and Mooncake's share in etcd. All
/// writers change a document by compare-and-swap; this one only touches its own entries.
package final class UpstreamCatalog: Sendable {
  private let directory: StoreDirectory
  private var service: any MetadataService { directory.store }

  /// Entries of our own that are still to be removed from a document.
  private struct PendingRemoval {
    var segment: String
    var attempts = 100
    /// An unanswered write may appear only after several looks: an etcd member that was stalled
    /// passes it on late. So the document is looked at repeatedly, each time after twice as many
    /// calls of `settle`.
    var looks = 12
    var pause = 1
    var turnsLeft = 0
  }
  private let removals = Lock<[MetadataKey: PendingRemoval]>([:])
  /// Names with an unanswered write: removed entries may come back.
  private let unanswered = Lock<Set<MetadataKey>>([])
  private static let unansweredLimit = 1024

  /// Longer documents are not written: by default etcd refuses requests above 1.5 MiB, and each
  /// replica rewrites the whole document.
  static let maximumDocumentBytes = 512 << 10
  /// Further replicas are known only by their own records.
  static let maximumReplicaCount = 16
  private static let attemptLimit = 16
  /// Few, because documents may be large.
  private static let pageCount = 16

  /// The only service in which Mooncake's store keeps documents.
  private static let upstreamService = MetadataURI.Service.etcd

  /// nil if Mooncake's store does not know the metadata service, or if the service does not compare
  /// revisions, so that one writer's change could overwrite another's.
  package init?(_ directory: StoreDirectory) {
    guard directory.uri.service == Self.upstreamService, directory.store.comparesRevisions
    else { return nil }
    self.directory = directory
  }

  /// A document and the revision that wrote it.
  package typealias Found = (document: UpstreamDocument, revision: UInt64)

  package func key(_ name: String) -> String { directory.prefix + "checkpoint/" + name }

  /// The document of a payload; nil if there is none.
  package func document(
    _ name: String, _ call: Call
  ) throws(MooncakeError) -> UpstreamDocument? {
    try revised(name, call)?.document
  }

  /// The same with its revision.
  package func revised(
    _ name: String, _ call: Call
  ) throws(MooncakeError) -> Found? {
    guard let found = try service.getRevised(key(name), call) else { return nil }
    do throws(MooncakeError) {
      let document = try UpstreamDocument(json: found.value)
      if !document.name.utf8.elementsEqual(name.utf8) { throw PayloadSummary.malformed("name") }
      return (document, found.revision)
    } catch {
      throw MooncakeError(
        error.code,
        "metadata \(directory.uri): key '\(key(name))': \(error.message): register the payload "
          + "anew; else remove the key with `mooncake metadata delete`")
    }
  }

  /// Payloads that have a document, in order of names. Malformed documents are skipped.
  package func list(
    prefix: String, _ call: Call
  ) throws(MooncakeError) -> [PayloadInfo] {
    var infos: [PayloadInfo] = []
    var position: String?
    repeat {
      let page = try service.list(
        prefix: key(prefix), from: position, limit: Self.pageCount, call)
      for entry in page.entries {
        guard let document = try? UpstreamDocument(json: entry.value),
          key(document.name).utf8.elementsEqual(entry.key.utf8)
        else { continue }
        infos.append(document.info)
      }
      position = page.next
    } while position != nil
    return infos
  }

  /// Writes the document of a payload that was registered here. It replaces an existing one, whose
  /// owners hold other bytes, unless only a new one is wanted.
  package func put(
    _ document: UpstreamDocument, isCreateOnly: Bool, _ call: Call
  ) throws(MooncakeError) {
    let key = key(document.name)
    keepEntries(document.name)
    do throws(MooncakeError) {
      try replace(document, key, isCreateOnly: isCreateOnly, call)
    } catch {
      if error.code != .exists { noteUnanswered(document.name) }
      throw error
    }
  }

  private func replace(
    _ document: UpstreamDocument, _ key: String, isCreateOnly: Bool, _ call: Call
  ) throws(MooncakeError) {
    let text = document.json
    let isShared = text.utf8.count <= Self.maximumDocumentBytes
    if isCreateOnly {
      let isFree =
        try isShared
        ? service.replace(key, writtenBy: 0, with: text, call) : service.get(key, call) == nil
      if !isFree {
        throw MooncakeError(
          .exists,
          "payload '\(document.name)': Mooncake's store has it (key '\(key)'): choose another "
            + "name, or do not ask for create-only")
      }
    } else if isShared {
      try service.put(MetadataEntry(key: key, value: text), lease: nil, call)
    } else {
      _ = try service.delete(key, call)
    }
    if !isShared {
      Log.info(
        "payload '\(document.name)': its \(document.shards.count) shards make a document of "
          + "\(text.utf8.count) bytes, above \(Self.maximumDocumentBytes): Mooncake's store "
          + "does not see it; larger shards would help")
    }
  }

  /// Adds a replica of all shards to a document that has room; does nothing without one. If a
  /// version is given, only while the name has that version.
  package func addReplica(
    _ name: String, version: PayloadVersion? = nil, segment: String, _ addresses: [UInt64],
    _ call: Call
  ) {
    keepEntries(name)
    let isDone = change(name, "adding a replica", call) { document throws(MooncakeError) in
      guard document.shards.count == addresses.count,
        document.shards.allSatisfy({ $0.replicas.count < Self.maximumReplicaCount })
      else { return false }
      // Order matters: a new version's head is put before its document. So a document read before
      // the head is this version's, or can no longer be replaced by us.
      if let version, try self.directory.head(name, call)?.version != version { return false }
      for index in document.shards.indices {
        document.shards[index].replicas.removeAll { $0.segment == segment }
        document.shards[index].replicas.append(
          UpstreamDocument.Location(segment: segment, offset: addresses[index]))
      }
      return true
    }
    if !isDone { noteUnanswered(name) }
  }

  /// Removes a segment's entries, and the document with the last one. If that fails, `settle`
  /// retries.
  package func removeOwn(_ name: String, segment: String, _ call: Call) {
    let isDone = remove(segment, of: name, isPending: false, call)
    let mayComeBack = unanswered.withLock { $0.remove(MetadataKey(name)) != nil }
    if !isDone || mayComeBack { owe(name, segment: segment) }
  }

  private func noteUnanswered(_ name: String) {
    unanswered.withLock { if $0.count < Self.unansweredLimit { $0.insert(MetadataKey(name)) } }
  }

  /// Notes that a segment's entries exist, or may appear, and are to be removed.
  func owe(_ name: String, segment: String) {
    removals.withLock { $0[MetadataKey(name)] = PendingRemoval(segment: segment) }
  }

  /// Entries put from now on stay.
  private func keepEntries(_ name: String) { removals.withLock { $0[MetadataKey(name)] = nil } }

  private func isPending(_ name: String) -> Bool {
    removals.withLock { $0[MetadataKey(name)] != nil }
  }

  /// Retries failed removals until the first failure. `isLast`: all of them now.
  package func settle(_ call: Call, isLast: Bool = false) {
    for (key, removal) in removals.withLock({ $0 }) {
      if removal.turnsLeft > 0 && !isLast {
        removals.withLock { $0[key]?.turnsLeft -= 1 }
        continue
      }
      let isDone = remove(removal.segment, of: key.text, isPending: true, call)
      removals.withLock { removals in
        guard var removal = removals[key] else { return }
        if isDone {
          removal.looks -= 1
          removal.turnsLeft = removal.pause - 1
          removal.pause *= 2
        } else {
          removal.attempts -= 1
        }
        removals[key] = removal.looks == 0 || removal.attempts == 0 ? nil : removal
      }
      if !isDone { return }
    }
  }

  /// `isPending`: only while nobody puts entries again. That is checked after each read, so a
  /// document with new entries is either left alone or fails the swap.
  private func remove(
    _ segment: String, of name: String, isPending: Bool, _ call: Call
  ) -> Bool {
    change(name, "removing own entries", call) { document throws(MooncakeError) in
      if isPending && !self.isPending(name) { return false }
      var isChanged = false
      for index in document.shards.indices {
        let shard = document.shards[index]
        document.shards[index].gold.removeAll { $0.segment == segment }
        document.shards[index].replicas.removeAll { $0.segment == segment }
        isChanged = isChanged || document.shards[index] != shard
      }
      return isChanged
    }
  }

  /// Removes a payload's document; returns whether there was one.
  package func remove(_ name: String, _ call: Call) throws(MooncakeError) -> Bool {
    try service.delete(key(name), call)
  }

  /// Reads, changes and swaps until no other writer interferes. Failures are logged: the document
  /// only helps processes that use Mooncake. Returns whether the document is as wanted.
  private func change(
    _ name: String, _ what: String, _ call: Call,
    _ body: (inout UpstreamDocument) throws(MooncakeError) -> Bool
  ) -> Bool {
    do throws(MooncakeError) {
      for attempt in 0..<Self.attemptLimit {
        guard let found = try revised(name, call) else { return true }
        var document = found.document
        guard try body(&document) else { return true }
        let text = document.isOrphaned ? nil : document.json
        if let text, text.utf8.count > Self.maximumDocumentBytes { return true }
        if try service.replace(key(name), writtenBy: found.revision, with: text, call) {
          return true
        }
        let pause = UInt64.random(in: 1...UInt64(2 << min(attempt, 6)))
        if call.sleep(milliseconds: pause) { break }
      }
      Log.warning("payload '\(name)': \(what) in '\(key(name))': other writers keep changing it")
    } catch {
      Log.warning("payload '\(name)': \(what): \(error.message)")
    }
    return false
  }
}
