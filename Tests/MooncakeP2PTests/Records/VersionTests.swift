import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import Testing

@Suite struct VersionTests {
  private func version(_ low: UInt64) -> PayloadVersion { PayloadVersion(high: 7, low: low) }

  private func put(_ record: HolderRecord, _ directory: StoreDirectory) throws {
    try directory.store.put(
      MetadataEntry(key: directory.holderKey(record), value: record.json), lease: nil, testCall)
  }

  @Test func versionsAreFoundBehindManyRecords() throws {
    let bench = Bench()
    let service = bench.service()
    let directory = bench.directory(service)
    // In key order the old version comes first, and fills more than a page.
    for _ in 0..<3000 { try put(testRecord("a", version: 1, isOrigin: false), directory) }
    let origin = testRecord("a", version: 2)
    try put(origin, directory)
    try put(testRecord("a", version: 3, isComplete: false, published: 1), directory)
    let calls = service.callCount
    #expect(try directory.newest(of: "a", testCall)?.version == origin.version)
    #expect(try directory.versions(of: "a", testCall).map(\.version.low) == [1, 2, 3])
    // Two pages each, and the removals.
    #expect(service.callCount - calls <= 5)
    #expect(
      try directory.holders(of: "a", origin.version, limit: 16, testCall).map(\.holder)
        == [origin.holder])
    #expect(try directory.list(prefix: "", testCall).map(\.version) == [origin.version])
    #expect(try directory.list(prefix: "", testCall).map(\.holderCount) == [1])
    // None of these is complete: all are read, a page at a time.
    for _ in 0..<1000 {
      try put(testRecord("parts", version: 1, isOrigin: false, isComplete: false), directory)
    }
    #expect(try directory.newest(of: "parts", testCall)?.holderCount == 1000)
    #expect(try directory.list(prefix: "parts", testCall).isEmpty)
  }

  @Test func anOlderVersionIsNotChosenSilently() throws {
    let bench = Bench()
    let service = bench.service()
    let (one, two) = (try bench.keeper(service, 1), try bench.keeper(service, 2))
    let directory = bench.directory(service)
    let (old, new) = (testRecord("a", version: 1), testRecord("a", version: 2))
    try one.publish(old, isCreateOnly: false, testCall)
    try two.publish(new, isCreateOnly: false, testCall)
    let told = Lock<[PayloadChange]>([])
    let follower = PayloadFollower(directory, prefix: "") { change in
      told.withLock { $0.append(change) }
    }
    let passed = Call(until: Deadline(nanoseconds: 1))
    try follower.turn(passed)
    try bench.pass(milliseconds: 1000, one, two)
    // The newer version's holders leave: the name is gone, and the older one does not return.
    two.remove(new, testCall)
    for _ in 0..<3 {
      try follower.turn(passed)
      try bench.pass(milliseconds: 1000, one, two)
      #expect(try directory.list(prefix: "", testCall).isEmpty)
      #expect(try directory.newest(of: "a", testCall) == nil)
    }
    let texts = told.withLock { $0.map { "\($0)".prefix(8) } }
    #expect(texts == ["appeared", "vanished"])
    // It can still be fetched by its digest.
    #expect(try directory.holders(of: "a", old.version, limit: 16, testCall).count == 1)
    // A holder that did not know of the newer version yields to it.
    try one.publish(testRecord("b", version: 5), isCreateOnly: false, testCall)
    bench.setCut(1, true)
    let newer = testRecord("b", version: 6)
    try two.publish(newer, isCreateOnly: false, testCall)
    try bench.pass(milliseconds: 4000, two)
    bench.setCut(2, true)
    try bench.pass(milliseconds: 4000)
    bench.setCut(1, false)
    try bench.pass(milliseconds: 1000, one)
    #expect(try directory.head("b", testCall)?.version.low == 5)
    bench.setCut(2, false)
    try bench.pass(milliseconds: 1000, two, one)
    #expect(try directory.head("b", testCall)?.version.low == 6)
    try bench.pass(milliseconds: 1000, one, two)
    #expect(try directory.allHolders(of: "b", testCall).filter(\.isSuperseded).count == 1)
  }

  @Test func removedVersionsStayRemoved() throws {
    let bench = Bench()
    let service = bench.service()
    let (origin, replica) = (try bench.keeper(service, 1), try bench.keeper(service, 2))
    let directory = bench.directory(service)
    let first = testRecord("a", version: 1)
    try origin.publish(first, isCreateOnly: false, testCall)
    replica.put(testRecord("a", version: 1, isOrigin: false), testCall)
    // Before the replica looks, the name is removed, published and removed again.
    #expect(try directory.remove("a", testCall))
    try bench.pass(milliseconds: 300, origin)
    try origin.publish(testRecord("a", version: 2), isCreateOnly: false, testCall)
    #expect(try directory.remove("a", testCall))
    try bench.pass(milliseconds: 2000, replica, origin)
    #expect(try directory.list(prefix: "", testCall).isEmpty)
    #expect(try directory.head("a", testCall) == nil)
    #expect(try directory.allHolders(of: "a", testCall).isEmpty)
    // Another version, published later by a clock that is behind, stays, whoever holds it.
    let late = testRecord("a", version: 3, published: 1)
    try origin.publish(late, isCreateOnly: true, testCall)
    var copy = testRecord("a", isOrigin: false)
    copy.summary = try #require(try directory.head("a", testCall)).summary
    replica.put(copy, testCall)
    origin.remove(late, testCall)
    try bench.pass(milliseconds: 2000, replica, origin)
    #expect(try directory.head("a", testCall)?.origin == copy.holder)
  }

  /// How long the holder is away: less than removals are remembered, longer, and much longer.
  @Test(arguments: [60_000, 45 * 60_000, 24 * 3_600_000] as [UInt64])
  func aHolderThatWasCutOffBringsNothingBack(_ milliseconds: UInt64) throws {
    let bench = Bench()
    let service = bench.service()
    let (one, two) = (try bench.keeper(service, 1), try bench.keeper(service, 2))
    let directory = bench.directory(service)
    try one.publish(testRecord("gone", version: 1), isCreateOnly: false, testCall)
    try one.publish(testRecord("kept", version: 2), isCreateOnly: false, testCall)
    try bench.pass(milliseconds: 1000, one)
    bench.setCut(1, true)
    // By then it is no longer listed.
    try bench.pass(milliseconds: 500)
    #expect(try directory.remove("gone", testCall))
    try two.publish(testRecord("other"), isCreateOnly: false, testCall)
    two.put(testRecord("kept", version: 2, isOrigin: false), testCall)
    for _ in 0..<20 { try bench.pass(milliseconds: milliseconds / 20, two) }
    bench.setCut(1, false)
    try bench.pass(milliseconds: 2000, one, two)
    #expect(try directory.list(prefix: "", testCall).map(\.name) == ["kept", "other"])
    #expect(try directory.allHolders(of: "gone", testCall).isEmpty)
    // What others still hold was not removed.
    #expect(try directory.allHolders(of: "kept", testCall).count == 2)
  }

  /// Nobody has removed anything: however long a service is away, its payloads come back.
  @Test func aServiceThatWasAwayForLongHasAllAgain() throws {
    let bench = Bench()
    let service = bench.service()
    let one = try bench.keeper(service, 1)
    let directory = bench.directory(service)
    #expect(try !directory.remove("none", testCall))
    try one.publish(testRecord("a"), isCreateOnly: false, testCall)
    try one.publish(testRecord("b"), isCreateOnly: false, testCall)
    #expect(try directory.remove("b", testCall))
    try bench.pass(milliseconds: 1000, one)
    bench.setCut(1, true)
    try bench.pass(milliseconds: 24 * 3_600_000)
    bench.setCut(1, false)
    try bench.pass(milliseconds: 2000, one)
    #expect(try directory.list(prefix: "", testCall).map(\.name) == ["a"])
    service.loseEverything()
    try bench.pass(milliseconds: 2000, one)
    #expect(try directory.list(prefix: "", testCall).map(\.name) == ["a"])
  }

  @Test func aDeletionThatFailedIsMadeUpFor() throws {
    let bench = Bench()
    let service = bench.service()
    let one = try bench.keeper(service, 1)
    let directory = bench.directory(service)
    let record = testRecord("a")
    try one.publish(record, isCreateOnly: false, testCall)
    try one.publish(testRecord("b"), isCreateOnly: false, testCall)
    bench.setCut(1, true)
    one.remove(record, testCall)
    bench.setCut(1, false)
    try bench.pass(milliseconds: 1000, one)
    #expect(try directory.allHolders(of: "a", testCall).isEmpty)
    #expect(try directory.list(prefix: "", testCall).map(\.name) == ["b"])
  }

  /// Losing one name to another process does not affect the others.
  @Test func oneLostNameIsNotAllLost() throws {
    let bench = Bench()
    let service = bench.service()
    let (one, two) = (try bench.keeper(service, 1), try bench.keeper(service, 2))
    for index in 0..<300 {
      try one.publish(testRecord("many/\(index)"), isCreateOnly: false, testCall)
    }
    try two.publish(testRecord("many/7", version: 2), isCreateOnly: false, testCall)
    try bench.pass(milliseconds: 600, one, two)
    let calls = service.callCount
    try bench.pass(milliseconds: 2000, one, two)
    // Four rounds of each: a renewal, the mark, up to three pages of names, one of tombstones.
    #expect(service.callCount - calls <= 4 * 2 * 6)
    #expect(service.lostLeaseCount == 0)
  }

  /// However many names lose their heads at once, a watch looks them up together.
  @Test func manyLostHeadsAreLookedAtTogether() throws {
    let bench = Bench()
    let service = bench.service()
    let directory = bench.directory(service)
    let count = Lock((appeared: 0, vanished: 0))
    let follower = PayloadFollower(directory, prefix: "") { change in
      count.withLock {
        if case .vanished = change { $0.vanished += 1 } else { $0.appeared += 1 }
      }
    }
    let records = (0..<1000).map { testRecord("many/\($0)") }
    for record in records {
      try put(record, directory)
      try directory.store.put(
        MetadataEntry(
          key: directory.headKey(record.name),
          value: PayloadHead(record.summary, origin: record.holder).json), lease: nil, testCall)
    }
    let passed = Call(until: Deadline(nanoseconds: 1))
    try follower.turn(passed)
    #expect(count.withLock { $0.appeared } == 1000)
    for record in records { _ = service.delete(directory.headKey(record.name)) }
    for record in records.prefix(500) { _ = service.delete(directory.holderKey(record)) }
    let calls = service.callCount
    try follower.turn(passed)
    #expect(count.withLock { $0.vanished } == 500)
    // The changes, a page of records, the removals, and four requests for the rest.
    #expect(service.callCount - calls <= 8)
  }

  /// An unreadable head of a payload without holders is looked up less and less often.
  @Test func aBlockedNameIsNotAskedForAllTheTime() throws {
    let bench = Bench()
    let service = bench.service()
    let directory = bench.directory(service)
    let names = Lock<[String]>([])
    let follower = PayloadFollower(directory, prefix: "") { change in
      if case .appeared(let info) = change { names.withLock { $0.append(info.name) } }
    }
    try directory.store.put(
      MetadataEntry(key: directory.headKey("a"), value: "{"), lease: nil, testCall)
    let passed = Call(until: Deadline(nanoseconds: 1))
    let calls = service.callCount
    for _ in 0..<100 {
      try follower.turn(passed)
      try bench.pass(milliseconds: 1000)
    }
    // One for the changes in each round; three per look, of which there are 4 and one in 10 s.
    #expect(service.callCount - calls <= 100 + 4 * 15)
    try put(testRecord("a"), directory)
    for _ in 0..<11 {
      try follower.turn(passed)
      try bench.pass(milliseconds: 1000)
    }
    #expect(names.withLock { $0 } == ["a"])
  }
}
