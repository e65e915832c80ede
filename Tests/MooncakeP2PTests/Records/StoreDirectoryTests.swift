import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import Synchronization
import Testing

/// A service that counts its listings.
private final class CountingStore: ForwardingService {
  let service: any MetadataService
  let entryCount = Atomic(0)
  let callCount = Atomic(0)

  init(_ service: any MetadataService) { self.service = service }

  func list(
    prefix: String, from position: String?, limit: Int, _ call: Call
  ) throws(MooncakeError) -> MetadataPage {
    let page = try service.list(prefix: prefix, from: position, limit: limit, call)
    entryCount.wrappingAdd(page.entries.count, ordering: .relaxed)
    callCount.wrappingAdd(1, ordering: .relaxed)
    return page
  }
}

@Suite struct StoreDirectoryTests {
  private func put(_ record: HolderRecord, _ directory: StoreDirectory) throws {
    try directory.store.put(
      MetadataEntry(key: directory.holderKey(record), value: record.json), lease: nil, testCall)
  }

  private func putHead(_ record: HolderRecord, _ directory: StoreDirectory) throws {
    let head = PayloadHead(record.summary, origin: record.holder)
    try directory.store.put(
      MetadataEntry(key: directory.headKey(record.name), value: head.json), lease: nil, testCall)
  }

  @Test(arguments: ServiceProcess.Kind.installed)
  func pagesAreCut(_ kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let store = try service.store()
    for index in 10..<30 {
      try store.put(MetadataEntry(key: "p/\(index)", value: "v"), lease: nil, testCall)
    }
    try store.put(MetadataEntry(key: "q", value: "v"), lease: nil, testCall)
    let first = try store.list(prefix: "p/", from: nil, limit: 7, testCall)
    #expect(first.entries.map(\.key) == (10..<17).map { "p/\($0)" } && first.next == "p/16")
    let middle = try store.list(prefix: "p/", from: "p/2", limit: 3, testCall)
    #expect(middle.entries.map(\.key) == ["p/20", "p/21", "p/22"])
    let last = try store.list(prefix: "p/", from: "p/28", limit: 7, testCall)
    #expect(last.entries.map(\.key) == ["p/29"] && last.next == nil)
    #expect(try store.list(prefix: "p/", from: "p/29", limit: 7, testCall).entries.isEmpty)
    #expect(try store.listAll(prefix: "", testCall).entries.count == 21)
  }

  @Test(arguments: ServiceProcess.Kind.installed)
  func aSampleOfManyHoldersStaysSmall(_ kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let holderCount = kind == .redis ? 2000 : 10_000
    let counting = CountingStore(try service.store())
    let directory = StoreDirectory(counting, prefix: "mooncake/", ttlMilliseconds: 2000)
    var records: [HolderRecord] = []
    for _ in 0..<holderCount { records.append(testRecord("many", isOrigin: false)) }
    let shares = records.indices.reduce(into: [[HolderRecord]](repeating: [], count: 4)) {
      $0[$1 % 4].append(records[$1])
    }
    let failures = Atomic(0)
    let threads = try shares.map { share in
      try WorkerThread.start(name: "put") {
        for record in share {
          do { try put(record, directory) } catch {
            failures.wrappingAdd(1, ordering: .relaxed)
          }
        }
      }
    }
    for thread in threads { thread.join() }
    let failureCount = failures.load(ordering: .relaxed)
    #expect(failureCount == 0)
    var seen: Set<UInt64> = []
    for _ in 0..<20 {
      let before = counting.entryCount.load(ordering: .relaxed)
      let calls = counting.callCount.load(ordering: .relaxed)
      let sample = try directory.holders(
        of: "many", PayloadVersion(high: 7, low: 1), limit: 16, testCall)
      #expect(sample.count == 16)
      #expect(Set(sample.map(\.holder)).count == 16)
      let read = counting.entryCount.load(ordering: .relaxed) - before
      #expect(read <= 32)
      #expect(counting.callCount.load(ordering: .relaxed) - calls <= 2)
      seen.formUnion(sample.map(\.holder.holding))
    }
    // Twenty samples from one place would find sixteen holders.
    #expect(seen.count > 100)
    #expect(
      try directory.list(prefix: "many", testCall).map(\.holderCount) == [UInt64(holderCount)])
  }

  @Test func aFewHoldersAreAllFoundFromAnywhere() throws {
    let service = try ServiceProcess(.ours)
    let directory = try service.directory()
    for holding in 1...5 { try put(testRecord("a/b", holding: UInt64(holding) << 61), directory) }
    try put(testRecord("a/b", version: 2, holding: 9), directory)
    try put(testRecord("a", holding: 10), directory)
    for _ in 0..<40 {
      let found = try directory.holders(
        of: "a/b", PayloadVersion(high: 7, low: 1), limit: 16, testCall)
      #expect(found.count == 5)
      #expect(Set(found.map(\.holder)).count == 5)
    }
    #expect(try directory.allHolders(of: "a/b", testCall).count == 6)
    #expect(try directory.allHolders(of: "a", testCall).count == 1)
    #expect(try directory.allHolders(of: "a/b", limit: 2, testCall).count == 2)
  }

  @Test func listsByNameWithHolders() throws {
    let service = try ServiceProcess(.ours)
    let directory = try service.directory()
    // Two spellings that look alike are different names.
    for name in ["b", "a/1", "e\u{301}", "\u{E9}"] {
      let record = testRecord(name)
      try putHead(record, directory)
      try put(record, directory)
    }
    try put(testRecord("b", isOrigin: false), directory)
    try put(testRecord("b", version: 9, isOrigin: false), directory)
    try put(testRecord("headless", version: 1), directory)
    try put(testRecord("headless", version: 2), directory)
    let all = try directory.list(prefix: "", testCall)
    #expect(all.map(\.name.utf8.count) == [3, 1, 3, 8, 2])
    #expect(all.map(\.holderCount) == [1, 2, 1, 1, 1])
    #expect(all[3].version == PayloadVersion(high: 7, low: 2))
    #expect(try directory.list(prefix: "a/", testCall).map(\.name) == ["a/1"])
    #expect(try directory.list(prefix: "none", testCall).isEmpty)
  }

  @Test func plantedTextsHarmNobody() throws {
    let service = try ServiceProcess(.ours)
    let directory = try service.directory()
    let good = testRecord("good")
    try putHead(good, directory)
    try put(good, directory)
    let stranger = testRecord("stranger")
    for (index, text) in [
      "", "{", "[]", "null", "\u{0}", String(repeating: "[", count: 70_000), stranger.json,
      PayloadHead(stranger.summary, origin: stranger.holder).json,
    ].enumerated() {
      for key in [
        directory.headKey("bad\(index)"),
        directory.tombstoneKey("bad\(index)", PayloadVersion(high: 7, low: 1)),
        directory.holderKey(testRecord("bad\(index)")), directory.holderKey(testRecord("good")),
        "mooncake/store/holder/%zz/\(index)", "mooncake/store/holder/\(index)",
        "mooncake/store/object/", "mooncake/store/\(index)",
      ] {
        try directory.store.put(MetadataEntry(key: key, value: text), lease: nil, testCall)
      }
      do {
        _ = try directory.head("bad\(index)", testCall)
        Issue.record("accepted \(text.prefix(50))")
      } catch {
        #expect(error.code == .protocolViolation && error.message.contains("bad\(index)"))
      }
      #expect(try directory.allHolders(of: "bad\(index)", testCall).isEmpty)
    }
    #expect(try directory.list(prefix: "", testCall).map(\.name) == ["good"])
    #expect(try directory.list(prefix: "", testCall).map(\.holderCount) == [1])
    #expect(try directory.allHolders(of: "good", testCall) == [good])
    // An unreadable head is removed like any other.
    #expect(try directory.remove("bad0", testCall))
    #expect(try directory.head("bad0", testCall) == nil)
  }

  @Test func removalNamesTheVersion() throws {
    let service = try ServiceProcess(.ours)
    let directory = try service.directory()
    #expect(try !directory.remove("a", testCall))
    let record = testRecord("a", version: 5)
    try put(record, directory)
    #expect(try directory.remove("a", testCall))
    try putHead(record, directory)
    #expect(try directory.remove("a", testCall))
    #expect(try directory.head("a", testCall) == nil)
    let text = try #require(
      try directory.store.get(directory.tombstoneKey("a", record.version), testCall))
    #expect(
      text.hasPrefix(#"{"name":"a","removed":"\#(record.version)","until_ms":1"#))
  }

  @Test func clustersAreApart() throws {
    let service = try ServiceProcess(.ours)
    let (one, two) = (try service.directory(cluster: "one"), try service.directory(cluster: "two"))
    try putHead(testRecord("a"), one)
    try put(testRecord("a"), one)
    #expect(try one.list(prefix: "", testCall).count == 1)
    #expect(try two.list(prefix: "", testCall).isEmpty)
    #expect(try two.head("a", testCall) == nil)
    #expect(try !two.remove("a", testCall))
  }
}
