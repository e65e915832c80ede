import MooncakeMetadata
import MooncakeTestSupport
import Testing

struct MetadataTableTests {
  /// The macro does not accept mutating calls.
  private func check(_ isTrue: Bool, at location: SourceLocation = #_sourceLocation) {
    #expect(isTrue, sourceLocation: location)
  }

  private func key(_ text: String) -> MetadataKey { MetadataKey(text) }

  @Test func keysAreBytes() {
    var table = MetadataTable(revision: 0)
    check(table.put(key("\u{E9}"), [1]) == .done)
    check(table.put(key("e\u{301}"), [2]) == .done)
    check(table.value(of: key("\u{E9}")) == [1] && table.count == 2)
  }

  @Test func keysAreSortedByTheirBytes() {
    // With all kinds of common prefixes and suffixes.
    let beginnings = ["", "mooncake/", "mooncake/ram/node-000000000", "mooncake/rpc_meta/\u{E9}"]
    for beginning in beginnings {
      var texts: Set<String> = []
      for _ in 0..<500 {
        let end = (0..<Int.random(in: 0...40)).map { _ in
          ["a", "b", "\0", "\u{FFFF}", "/"].randomElement()!
        }
        texts.insert(beginning + end.joined())
      }
      for text in beginnings { texts.insert(text) }
      let sorted = MetadataKey.sorted(texts.map { MetadataKey($0) })
      let expected = texts.sorted { Array($0.utf8).lexicographicallyPrecedes(Array($1.utf8)) }
      check(sorted.map(\.text) == expected && sorted == sorted.sorted())
    }
    check(MetadataKey.sorted([]) == [] && MetadataKey.sorted([key("")]) == [key("")])
  }

  @Test func deletesOnlyTheNamedValue() {
    var table = MetadataTable(revision: 0)
    check(!table.delete(key("a"), ifItIs: []))
    check(table.put(key("a"), [1, 2]) == .done)
    for other in [[], [1], [1, 3], [1, 2, 3]] as [[UInt8]] {
      check(!table.delete(key("a"), ifItIs: other) && table.count == 1)
    }
    check(table.delete(key("a"), ifItIs: [1, 2]) && table.count == 0 && table.usedBytes == 0)
  }

  @Test func pagesInOrder() {
    var table = MetadataTable(revision: 0)
    for index in (0..<100).reversed() { _ = table.put(key("k\(1000 + index)"), [UInt8(index)]) }
    _ = table.put(key("l"), [])
    var seen: [String] = []
    var position: String?
    while true {
      let page = table.list(prefix: "k", after: position, limit: 7, byteLimit: 1 << 20)
      seen += page.entries.map(\.key.text)
      position = page.entries.last?.key.text
      if !page.isCut { break }
    }
    check(seen == (0..<100).map { "k\(1000 + $0)" })
    let small = table.list(prefix: "", after: nil, limit: 1000, byteLimit: 1000)
    check(small.isCut && small.entries.count < 10)
  }

  @Test func leases() {
    var table = MetadataTable(revision: 0)
    check(table.grant(7, ttlMilliseconds: 1000, now: 0))
    check(
      !table.grant(7, ttlMilliseconds: 1000, now: 0) && !table.grant(0, ttlMilliseconds: 1, now: 0))
    check(table.put(key("a"), [1], lease: 7) == .done)
    check(table.put(key("b"), [1], lease: 7) == .done)
    check(table.put(key("c"), [1], lease: 8) == .noLease)
    // A new put takes the key off the lease.
    check(table.put(key("b"), [2]) == .done)
    check(table.renew(7, now: 500_000_000)?.keys.count == 1)
    check(table.expired(now: 1_400_000_000).isEmpty)
    check(table.expired(now: 1_500_000_000) == [7])
    check(table.revoke(7) && !table.revoke(7) && table.renew(7, now: 0) == nil)
    check(table.value(of: key("a")) == nil && table.value(of: key("b")) == [2])
    check(table.nextExpiry == .max)
  }

  /// Ending leases scans all keys once, not once per key.
  @Test func manyKeysOfALeaseEndTogether() {
    var table = MetadataTable(revision: 0)
    table.startRestore()
    for lease in 1...3 as ClosedRange<UInt64> {
      check(table.restoreLease(lease, ttlMilliseconds: 1000, now: 0))
    }
    // Every tenth belongs to the first lease, and 20 of the first 100 to the others.
    for index in 0..<60_000 {
      let isOfOthers = index < 100 && index % 10 < 3
      let lease = UInt64(index % 10 == 0 ? 1 : isOfOthers ? 2 + index % 2 : 0)
      check(table.restore(key("k\(1_000_000 + index)"), [1], lease: lease))
    }
    table.finishRestore()
    let time = elapsedMilliseconds { check(table.revoke(1)) }
    check(table.count == 54_000 && table.usedBytes > 0)
    #expect(time < 1500, "it took \(time) ms")
    table.revoke([2, 3])
    check(table.count == 53_980 && table.leases.isEmpty)
    let page = table.list(prefix: "", after: nil, limit: 200_000, byteLimit: .max)
    check(page.entries.count == table.count)
    check(page.entries.map(\.key) == page.entries.map(\.key).sorted())
    check(page.entries.first?.key == key("k1000003") && page.entries.last?.key == key("k1059999"))
    check(table.changes(prefix: "", since: table.revision - 3)?.count == 3)
  }

  @Test func restoresInAnyOrder() {
    var table = MetadataTable(revision: 9)
    table.startRestore()
    check(table.restoreLease(7, ttlMilliseconds: 1000, now: 0))
    for text in ["c", "a", "d", "b", "a"] {
      check(table.restore(key(text), [1], lease: text == "d" ? 7 : 0))
    }
    check(table.delete(key("c")) && !table.delete(key("c")) && table.revoke(7))
    table.finishRestore()
    check(table.allEntries.map(\.key.text) == ["a", "b"])
    check(table.count == 2 && table.changes(prefix: "", since: 9)?.isEmpty == true)
    check(table.put(key("aa"), [1]) == .done && table.delete(key("b")))
    check(table.allEntries.map(\.key.text) == ["a", "aa"])
    check(table.changes(prefix: "", since: 9)?.count == 2)
  }

  @Test func stallsPostpone() {
    var table = MetadataTable(revision: 0)
    _ = table.grant(1, ttlMilliseconds: 1000, now: 0)
    table.postpone(nanoseconds: 5_000_000_000)
    check(table.expired(now: 5_900_000_000).isEmpty)
    check(table.expired(now: 6_000_000_000) == [1])
  }

  @Test func changesAreRemembered() {
    var limits = MetadataLimits()
    limits.historyCount = 10
    var table = MetadataTable(revision: 100, limits: limits)
    check(table.changes(prefix: "", since: 100)?.isEmpty == true)
    check(
      table.changes(prefix: "", since: 99) == nil && table.changes(prefix: "", since: 101) == nil)
    for index in 0..<50 { _ = table.put(key("a\(index % 5)"), [UInt8(index)]) }
    _ = table.delete(key("a0"))
    check(table.revision == 151)
    check(table.changes(prefix: "", since: 100) == nil)
    let last = table.changes(prefix: "a0", since: 145)
    check(last?.map(\.revision) == [146, 151] && last?.last?.value == nil)
  }

  @Test func bounds() {
    var limits = MetadataLimits()
    limits.totalBytes = 2000
    limits.keyBytes = 10
    limits.valueBytes = 1000
    limits.leaseCount = 1
    var table = MetadataTable(revision: 0, limits: limits)
    check(table.put(key("12345678901"), []) == .tooLarge)
    check(table.put(key("a"), [UInt8](repeating: 0, count: 1001)) == .tooLarge)
    check(table.put(key("a"), [UInt8](repeating: 0, count: 1000)) == .done)
    check(table.put(key("b"), [UInt8](repeating: 0, count: 1000)) == .full)
    check(table.put(key("a"), [], isOnlyIfAbsent: true) == .exists)
    check(table.put(key("a"), [1]) == .done)
    check(table.put(key("b"), [UInt8](repeating: 0, count: 1000)) == .done)
    check(
      table.grant(1, ttlMilliseconds: 1, now: 0) && !table.grant(2, ttlMilliseconds: 1, now: 0))
    _ = table.delete(key("a"))
    _ = table.delete(key("b"))
    check(table.usedBytes == 0)
  }
}
