import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem

/// The documents that this store and the existing system's share in etcd: who has which payload.
/// Everybody changes a document by compare-and-swap; we touch only our own entries in it.
package final class UpstreamCatalog: Sendable {
  private let directory: StoreDirectory
  private let etcd: EtcdStore

  /// Own entries of a name that are still to be removed.
  private struct Debt {
    var segment: String
    var attempts = 100
    /// What was put without an answer may be there only after the first look, or after many: a
    /// member that stood still tells the others late. So it is looked at again, each time after
    /// twice as many calls of `settle`.
    var looks = 12
    var pause = 1
    var turnsLeft = 0
  }
  private let debts = Lock<[MetadataKey: Debt]>([:])
  /// Names whose entries were put without an answer: what is removed may come back.
  private let doubts = Lock<Set<MetadataKey>>([])
  private static let doubtLimit = 1024

  /// A longer document is not written: etcd refuses requests above 1.5 MiB unless told otherwise,
  /// and each replica rewrites all of it.
  static let maximumDocumentBytes = 512 << 10
  /// Further replicas are known by their own records only.
  static let maximumReplicaCount = 16
  private static let attemptLimit = 16
  /// Documents may be large.
  private static let pageCount = 16

  /// nil unless the metadata service is etcd.
  package init?(_ directory: StoreDirectory) {
    guard let etcd = directory.store as? EtcdStore else { return nil }
    self.directory = directory
    self.etcd = etcd
  }

  /// A document, and the revision of etcd that wrote it.
  package typealias Found = (document: UpstreamDocument, revision: UInt64)

  package func key(_ name: String) -> String { directory.prefix + "checkpoint/" + name }

  /// The document of a payload; nil if there is none.
  package func document(
    _ name: String, _ call: MetadataCall
  ) throws(EngineError) -> UpstreamDocument? {
    try revised(name, call)?.document
  }

  /// The same with its revision.
  package func revised(
    _ name: String, _ call: MetadataCall
  ) throws(EngineError) -> Found? {
    guard let (text, revision) = try etcd.getRevised(key(name), call) else { return nil }
    do throws(EngineError) {
      let document = try UpstreamDocument(json: text)
      if !document.name.utf8.elementsEqual(name.utf8) { throw PayloadSummary.malformed("name") }
      return (document, revision)
    } catch {
      throw EngineError(
        error.code,
        "metadata \(directory.uri): key '\(key(name))': \(error.message): register the payload "
          + "anew; else remove the key with `mooncake metadata delete`")
    }
  }

  /// Payloads that have a document, in order of names. Malformed documents are passed over.
  package func list(
    prefix: String, _ call: MetadataCall
  ) throws(EngineError) -> [PayloadInfo] {
    var infos: [PayloadInfo] = []
    var position: String?
    repeat {
      let page = try etcd.list(
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

  /// Writes the document of a payload that was registered here. It replaces another one, whose
  /// owners hold other bytes, unless only a new one is wanted.
  package func put(
    _ document: UpstreamDocument, isCreateOnly: Bool, _ call: MetadataCall
  ) throws(EngineError) {
    let key = key(document.name)
    forgive(document.name)
    do throws(EngineError) {
      try replace(document, key, isCreateOnly: isCreateOnly, call)
    } catch {
      if error.code != .exists { doubt(document.name) }
      throw error
    }
  }

  private func replace(
    _ document: UpstreamDocument, _ key: String, isCreateOnly: Bool, _ call: MetadataCall
  ) throws(EngineError) {
    let text = document.json
    let isShared = text.utf8.count <= Self.maximumDocumentBytes
    if isCreateOnly {
      let isFree =
        try isShared
        ? etcd.replace(key, writtenBy: 0, with: text, call) : etcd.get(key, call) == nil
      if !isFree {
        throw EngineError(
          .exists,
          "payload '\(document.name)': the existing system has it (key '\(key)'): choose another "
            + "name, or do not ask for create-only")
      }
    } else if isShared {
      try etcd.put(MetadataEntry(key: key, value: text), lease: nil, call)
    } else {
      _ = try etcd.delete(key, call)
    }
    if !isShared {
      Log.info(
        "payload '\(document.name)': its \(document.shards.count) shards make a document of "
          + "\(text.utf8.count) bytes, above \(Self.maximumDocumentBytes): the existing system's "
          + "store does not see it; larger shards would help")
    }
  }

  /// Adds a replica of all shards to a document that has room; does nothing if there is none. Given
  /// a version, only while the name has that one.
  package func addReplica(
    _ name: String, version: PayloadVersion? = nil, segment: String, _ addresses: [UInt64],
    _ call: MetadataCall
  ) {
    forgive(name)
    let isDone = change(name, "adding a replica", call) { document throws(EngineError) in
      guard document.shards.count == addresses.count,
        document.shards.allSatisfy({ $0.replicas.count < Self.maximumReplicaCount })
      else { return false }
      // In this order: a new version's head stands before its document is written, so that a
      // document read before the head is this version's, or is not written any more.
      if let version, try self.directory.head(name, call)?.version != version { return false }
      for index in document.shards.indices {
        document.shards[index].replicas.removeAll { $0.segment == segment }
        document.shards[index].replicas.append(
          UpstreamDocument.Location(segment: segment, offset: addresses[index]))
      }
      return true
    }
    if !isDone { doubt(name) }
  }

  /// Removes a segment's entries, and the document with the last one. Should that fail, `settle`
  /// does it.
  package func removeOwn(_ name: String, segment: String, _ call: MetadataCall) {
    let isDone = remove(segment, of: name, isOwed: false, call)
    let mayComeBack = doubts.withLock { $0.remove(MetadataKey(name)) != nil }
    if !isDone || mayComeBack { owe(name, segment: segment) }
  }

  private func doubt(_ name: String) {
    doubts.withLock { if $0.count < Self.doubtLimit { $0.insert(MetadataKey(name)) } }
  }

  /// Notes that a segment's entries are there, or may appear, and are to be removed.
  func owe(_ name: String, segment: String) {
    debts.withLock { $0[MetadataKey(name)] = Debt(segment: segment) }
  }

  /// What is put now stays.
  private func forgive(_ name: String) { debts.withLock { $0[MetadataKey(name)] = nil } }

  private func isOwed(_ name: String) -> Bool { debts.withLock { $0[MetadataKey(name)] != nil } }

  /// Removes what could not be removed before, until the first failure. `isLast`: all of it now.
  package func settle(_ call: MetadataCall, isLast: Bool = false) {
    for (key, debt) in debts.withLock({ $0 }) {
      if debt.turnsLeft > 0 && !isLast {
        debts.withLock { $0[key]?.turnsLeft -= 1 }
        continue
      }
      let isDone = remove(debt.segment, of: key.text, isOwed: true, call)
      debts.withLock { debts in
        guard var debt = debts[key] else { return }
        if isDone {
          debt.looks -= 1
          debt.turnsLeft = debt.pause - 1
          debt.pause *= 2
        } else {
          debt.attempts -= 1
        }
        debts[key] = debt.looks == 0 || debt.attempts == 0 ? nil : debt
      }
      if !isDone { return }
    }
  }

  /// `isOwed`: only as long as nobody puts entries anew. That is asked after each reading, so a
  /// document with new ones is either left alone or not the one that is replaced.
  private func remove(
    _ segment: String, of name: String, isOwed: Bool, _ call: MetadataCall
  ) -> Bool {
    change(name, "removing own entries", call) { document throws(EngineError) in
      if isOwed && !self.isOwed(name) { return false }
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
  package func remove(_ name: String, _ call: MetadataCall) throws(EngineError) -> Bool {
    try etcd.delete(key(name), call)
  }

  /// Reads, changes and swaps until nobody came between. What fails is logged: the document only
  /// helps processes of the existing system. Returns whether it is as it is to be.
  private func change(
    _ name: String, _ what: String, _ call: MetadataCall,
    _ body: (inout UpstreamDocument) throws(EngineError) -> Bool
  ) -> Bool {
    do throws(EngineError) {
      for attempt in 0..<Self.attemptLimit {
        guard let found = try revised(name, call) else { return true }
        var document = found.document
        guard try body(&document) else { return true }
        let text = document.isOrphaned ? nil : document.json
        if let text, text.utf8.count > Self.maximumDocumentBytes { return true }
        if try etcd.replace(key(name), writtenBy: found.revision, with: text, call) { return true }
        let pause = UInt64.random(in: 1...UInt64(2 << min(attempt, 6)))
        if Waiting.sleep(
          until: min(call.deadline, .after(milliseconds: pause)), cancellation: call.cancellation)
        {
          break
        }
      }
      Log.warning("payload '\(name)': \(what) in '\(key(name))': others change it all the time")
    } catch {
      Log.warning("payload '\(name)': \(what): \(error.message)")
    }
    return false
  }
}
