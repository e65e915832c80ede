import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// An etcd whose revisions cannot be compared, as if behind a proxy.
private final class WithoutRevisions: ForwardingService {
  let service: any MetadataService
  let listingScansAllKeys = false
  let comparesRevisions = false

  init(_ service: any MetadataService) { self.service = service }
}

/// The documents that both stores write, on a real etcd.
@Suite(.enabled(if: ServiceProcess.Kind.etcd.isInstalled, "etcd is not installed"))
struct UpstreamCatalogTests {
  private func document(
    _ name: String, segment: String = "owner", shardCount: Int = 2
  ) throws -> UpstreamDocument {
    UpstreamDocument(
      name: name,
      layout: try ShardLayout(bufferSizes: [UInt64(shardCount) * 64], shardBytes: 64),
      segment: segment, addresses: (0..<shardCount).map { UInt64($0 + 1) << 20 })
  }

  private func plant(_ text: String, _ name: String, _ directory: StoreDirectory) throws {
    try directory.store.put(
      MetadataEntry(key: "mooncake/checkpoint/\(name)", value: text), lease: nil, testCall)
  }

  @Test func onlyEtcdHasThem() throws {
    let service = try ServiceProcess(.ours)
    #expect(UpstreamCatalog(try service.directory()) == nil)
  }

  @Test func theyNeedRevisions() throws {
    let etcd = try ServiceProcess(.etcd).store()
    func catalog(_ service: any MetadataService) -> UpstreamCatalog? {
      UpstreamCatalog(StoreDirectory(service, prefix: "mooncake/", ttlMilliseconds: 2000))
    }
    #expect(catalog(LateStore(etcd)) != nil)
    #expect(catalog(WithoutRevisions(etcd)) == nil)
  }

  @Test func registersReplicatesAndWithdraws() throws {
    let service = try ServiceProcess(.etcd)
    let directory = try service.directory()
    let catalog = try #require(UpstreamCatalog(directory))
    try catalog.put(try document("a"), isCreateOnly: true, testCall)
    #expect(
      code { try catalog.put(try document("a"), isCreateOnly: true, testCall) } == .exists)
    catalog.addReplica("a", segment: "n1", [5, 6], testCall)
    catalog.addReplica("a", segment: "n1", [7, 8], testCall)
    catalog.addReplica("a", segment: "n2", [7], testCall)
    catalog.addReplica("none", segment: "n1", [7], testCall)
    var found = try #require(try catalog.document("a", testCall))
    #expect(
      found.shards.map(\.replicas) == [
        [.init(segment: "n1", offset: 7)],
        [.init(segment: "n1", offset: 8)],
      ])
    #expect(try catalog.list(prefix: "", testCall).map(\.holderCount) == [2])
    catalog.removeOwn("a", segment: "owner", testCall)
    found = try #require(try catalog.document("a", testCall))
    #expect(found.holders.map(\.segment) == ["n1"])
    catalog.removeOwn("a", segment: "n1", testCall)
    #expect(try catalog.document("a", testCall) == nil)
    #expect(try !catalog.remove("a", testCall))
    try catalog.put(try document("a"), isCreateOnly: false, testCall)
    try catalog.put(try document("a", segment: "second"), isCreateOnly: false, testCall)
    #expect(try catalog.document("a", testCall)?.holders.map(\.segment) == ["second"])
    #expect(try catalog.remove("a", testCall))
  }

  @Test func whatCouldNotBeRemovedIsRemovedLater() throws {
    let service = try ServiceProcess(.etcd)
    let directory = try service.directory()
    let catalog = try #require(UpstreamCatalog(directory))
    let canceled = try EventFD()
    canceled.signal()
    let late = Call(
      until: .after(milliseconds: 10_000), cancellation: canceled.descriptor.rawValue)
    try catalog.put(try document("a"), isCreateOnly: true, testCall)
    catalog.removeOwn("a", segment: "owner", late)
    catalog.settle(late)
    #expect(try catalog.document("a", testCall) != nil)
    catalog.settle(testCall)
    #expect(try catalog.document("a", testCall) == nil)
    // An entry registered anew stays.
    try catalog.put(try document("b"), isCreateOnly: true, testCall)
    catalog.removeOwn("b", segment: "owner", late)
    try catalog.put(try document("b"), isCreateOnly: false, testCall)
    catalog.settle(testCall)
    #expect(try catalog.document("b", testCall) != nil)
    canceled.clear()
  }

  @Test func othersEntriesStay() throws {
    let service = try ServiceProcess(.etcd)
    let directory = try service.directory()
    let catalog = try #require(UpstreamCatalog(directory))
    try plant(UpstreamDocumentTests.foreign, "ckpt/a", directory)
    catalog.addReplica("ckpt/a", segment: "ours", [1 << 40, 2 << 40], testCall)
    catalog.removeOwn("ckpt/a", segment: "somebody", testCall)
    var expected = try UpstreamDocument(json: UpstreamDocumentTests.foreign)
    for index in 0..<2 {
      expected.shards[index].replicas.append(
        .init(segment: "ours", offset: UInt64(index + 1) << 40))
    }
    #expect(try catalog.document("ckpt/a", testCall) == expected)
    catalog.removeOwn("ckpt/a", segment: "ours", testCall)
    #expect(
      try catalog.document("ckpt/a", testCall)
        == UpstreamDocument(json: UpstreamDocumentTests.foreign))
  }

  @Test func concurrentReplicasAllGetIn() throws {
    let service = try ServiceProcess(.etcd)
    let directory = try service.directory()
    let catalog = try #require(UpstreamCatalog(directory))
    try catalog.put(try document("a"), isCreateOnly: false, testCall)
    func onThreads(_ count: Int, _ body: @escaping @Sendable (Int) -> Void) throws {
      let threads = try (0..<count).map { index in
        try WorkerThread.start(name: "join") { body(index) }
      }
      for thread in threads { thread.join() }
    }
    try onThreads(8) { catalog.addReplica("a", segment: "n\($0)", [1, 2], testCall) }
    #expect(try catalog.document("a", testCall)?.holders.count == 9)
    // Sixteen replicas are the limit.
    for index in 8..<20 { catalog.addReplica("a", segment: "n\(index)", [1, 2], testCall) }
    #expect(try catalog.document("a", testCall)?.holders.count == 17)
    try onThreads(8) { catalog.removeOwn("a", segment: "n\($0)", testCall) }
    #expect(try catalog.document("a", testCall)?.holders.count == 9)
  }

  @Test func aLateReplicaStaysOutOfTheNextVersion() throws {
    let service = try ServiceProcess(.etcd)
    let directory = try service.directory()
    let catalog = try #require(UpstreamCatalog(directory))
    let (one, two) = (testRecord("a", version: 1), testRecord("a", version: 2))
    let head = PayloadHead(two.summary, origin: two.holder)
    try directory.store.put(
      MetadataEntry(key: directory.headKey("a"), value: head.json), lease: nil, testCall)
    try catalog.put(try document("a"), isCreateOnly: false, testCall)
    catalog.addReplica("a", version: one.version, segment: "late", [1, 2], testCall)
    #expect(try catalog.document("a", testCall)?.holders.count == 1)
    catalog.addReplica("a", version: two.version, segment: "right", [1, 2], testCall)
    #expect(try catalog.document("a", testCall)?.holders.count == 2)
  }

  @Test func aLargePayloadIsNotShared() throws {
    let service = try ServiceProcess(.etcd)
    let directory = try service.directory()
    let catalog = try #require(UpstreamCatalog(directory))
    try catalog.put(try document("a"), isCreateOnly: false, testCall)
    let large = try document("a", shardCount: 20_000)
    #expect(code { try catalog.put(large, isCreateOnly: true, testCall) } == .exists)
    // The existing document describes other bytes.
    try catalog.put(large, isCreateOnly: false, testCall)
    #expect(try catalog.document("a", testCall) == nil)
    try catalog.put(large, isCreateOnly: true, testCall)
    // A document that others have made too long for another replica is left alone.
    let foreign = try document("b", segment: String(repeating: "s", count: 150), shardCount: 2200)
    #expect(foreign.json.utf8.count < 512 << 10)
    try catalog.put(foreign, isCreateOnly: true, testCall)
    catalog.addReplica("b", segment: "n", Array(repeating: 1 << 40, count: 2200), testCall)
    #expect(try catalog.document("b", testCall) == foreign)
  }

  @Test func swapsOnlyWhatWasRead() throws {
    let service = try ServiceProcess(.etcd)
    let etcd = try service.store()
    #expect(etcd.comparesRevisions)
    #expect(try etcd.getRevised("k", testCall) == nil)
    #expect(try etcd.replace("k", writtenBy: 0, with: "1", testCall))
    #expect(try !etcd.replace("k", writtenBy: 0, with: "2", testCall))
    let found = try #require(try etcd.getRevised("k", testCall))
    #expect(found.value == "1" && found.revision > 0)
    #expect(try etcd.replace("k", writtenBy: found.revision, with: "3", testCall))
    #expect(try !etcd.replace("k", writtenBy: found.revision, with: nil, testCall))
    let latest = try #require(try etcd.getRevised("k", testCall)).revision
    #expect(try etcd.replace("k", writtenBy: latest, with: nil, testCall))
    #expect(try etcd.get("k", testCall) == nil)
  }

  @Test func plantedDocumentsHarmNobody() throws {
    let service = try ServiceProcess(.etcd)
    let directory = try service.directory()
    let catalog = try #require(UpstreamCatalog(directory))
    let texts = [
      "{", "[]", "null", "{}", UpstreamDocumentTests.foreign,
      String(repeating: "[", count: 70_000), #"{"name":"bad","shards":[{}]}"#,
    ]
    for (index, text) in texts.enumerated() {
      try plant(text, "bad\(index)", directory)
      catalog.addReplica("bad\(index)", segment: "n", [1, 2], testCall)
      catalog.removeOwn("bad\(index)", segment: "n1", testCall)
      #expect(
        code { _ = try catalog.document("bad\(index)", testCall) } == .protocolViolation)
      #expect(try directory.store.get("mooncake/checkpoint/bad\(index)", testCall) == text)
    }
    #expect(try catalog.list(prefix: "", testCall).isEmpty)
  }
}
