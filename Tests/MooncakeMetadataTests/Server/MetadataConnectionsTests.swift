import MooncakeMetadata
import Testing

struct MetadataConnectionsTests {
  private func connections(limit: Int, groupLimit: Int) -> MetadataConnections {
    MetadataConnections(
      limit: limit, groupLimit: groupLimit, patienceMilliseconds: 1, graceMilliseconds: 0)
  }

  private func answer(_ key: UInt, _ all: inout MetadataConnections, now: UInt64) {
    for phase: MetadataConnections.Phase in [.body, .work, .answer] {
      all.enter(phase, key, now: now)
    }
    all.finish(key, isKnown: true, now: now)
  }

  @Test func theCrowdGivesWayFirst() {
    var all = connections(limit: 4, groupLimit: 3)
    all.add(1, socket: 1, group: "few", now: 10)
    all.add(2, socket: 2, group: "many", now: 30)
    all.add(3, socket: 3, group: "many", now: 20)
    #expect(all.verdict(group: "few", now: 60) == .welcome)
    all.add(4, socket: 4, group: "many", now: 5)
    answer(4, &all, now: 6)
    // A client that was answered before is kept longer than one that was always slow.
    #expect(all.verdict(group: "few", now: 60) == .instead(of: 3))
    all.startClosing(3)
    #expect(all.verdict(group: "few", now: 60) == .welcome && all.count == 3)
    all.add(5, socket: 5, group: "many", now: 40)
    #expect(all.verdict(group: "few", now: 60) == .instead(of: 2))
    all.enter(.work, 2, now: 50)
    all.enter(.work, 5, now: 50)
    #expect(all.verdict(group: "few", now: 60) == .instead(of: 4))
    all.enter(.work, 4, now: 50)
    #expect(all.verdict(group: "many", now: 60) == .refused)
    #expect(all.verdict(group: "few", now: 60) == .instead(of: 1) && !all.isFull)
    all.enter(.work, 1, now: 50)
    #expect(all.verdict(group: "few", now: 60) == .full && all.isFull)
    all.remove(3)
    all.remove(2)
    #expect(all.verdict(group: "few", now: 60) == .welcome && all.count == 3)
  }

  @Test func whoTakesTooLong() {
    var all = connections(limit: 9, groupLimit: 9)
    #expect(all.nextCheck == .max)
    all.add(1, socket: 1, group: "a", now: 0)
    all.add(2, socket: 2, group: "a", now: 500_000)
    all.add(3, socket: 3, group: "a", now: 0)
    all.enter(.work, 3, now: 0)
    #expect(all.nextCheck == 1_000_000)
    #expect(all.overdue(now: 999_999).isEmpty)
    #expect(all.overdue(now: 1_000_000) == [1])
    all.startClosing(1)
    #expect(all.nextCheck == 1_500_000)
    #expect(all.overdue(now: 1_500_000) == [2])
    all.enter(.body, 2, now: 1_500_000)
    #expect(all.overdue(now: 2_000_000).isEmpty)
    for key: UInt in [1, 2, 3] { all.remove(key) }
    #expect(all.nextCheck == .max && all.count == 0)
  }

  @Test func graceForThoseWhoHaveJustCome() {
    var all = MetadataConnections(
      limit: 4, groupLimit: 4, patienceMilliseconds: 60_000, graceMilliseconds: 1)
    all.add(1, socket: 1, group: "a", now: 1_000_000)
    answer(1, &all, now: 1_500_000)
    all.add(2, socket: 2, group: "a", now: 0)
    all.add(3, socket: 3, group: "a", now: 1_200_000)
    // Answered, but only with something that everybody gets.
    all.add(4, socket: 4, group: "a", now: 0)
    all.finish(4, isKnown: false, now: 1_100_000)
    #expect(all.verdict(group: "a", now: 1_600_000) == .instead(of: 2))
    all.startClosing(2)
    all.add(5, socket: 5, group: "a", now: 1_600_000)
    #expect(all.verdict(group: "a", now: 1_600_000) == .instead(of: 1))
    all.enter(.body, 1, now: 1_600_000)
    #expect(all.verdict(group: "a", now: 1_600_000) == .instead(of: 4))
    #expect(all.verdict(group: "a", now: 2_300_000) == .instead(of: 4))
    all.startClosing(4)
    all.add(6, socket: 6, group: "a", now: 2_300_000)
    #expect(all.verdict(group: "a", now: 2_300_000) == .instead(of: 3))
  }

  @Test func memoryIsTakenFromWhoHoldsMost() {
    var all = connections(limit: 9, groupLimit: 9)
    for key: UInt in 1...5 {
      all.add(key, socket: 1, group: key < 3 ? "few" : "many", now: 0)
      all.enter(.body, key, now: UInt64(key))
    }
    for (key, byteCount) in [(1, 50), (3, 10), (4, 40), (5, 30)] as [(UInt, Int)] {
      all.hold(byteCount, key)
    }
    #expect(all.heaviest(in: .answer, neededBytes: 1, now: 10) == nil)
    #expect(all.heaviest(in: .body, neededBytes: 1, now: 10) == 3)
    all.startClosing(3)
    // The space about to become free suffices.
    #expect(all.heaviest(in: .body, neededBytes: 10, now: 10) == nil)
    #expect(all.heaviest(in: .body, neededBytes: 11, now: 10) == 4)
    all.remove(3)
    #expect(all.heaviest(in: .body, neededBytes: 1, now: 10) == 4)
    all.enter(.work, 4, now: 10)
    #expect(all.heaviest(in: .body, neededBytes: 1, now: 10) == 1)
  }

  @Test func watchesOfTheCrowdEndFirst() {
    var all = MetadataConnections(
      limit: 3, groupLimit: 2, patienceMilliseconds: 1, graceMilliseconds: 1)
    all.add(1, socket: 1, group: "few", now: 0)
    all.add(2, socket: 2, group: "many", now: 0)
    all.add(3, socket: 3, group: "many", now: 0)
    for key: UInt in 1...3 { all.enter(.watch, key, now: UInt64(key)) }
    #expect(all.isFull && all.longestWatch(group: nil, now: 1_000_000) == nil)
    #expect(all.longestWatch(group: nil, now: 1_000_002) == 2)
    #expect(all.longestWatch(group: "few", now: 1_000_002) == 1)
    #expect(all.longestWatch(group: "other", now: 1_000_002) == nil)
    // They are waiting for the server, not the reverse.
    #expect(all.overdue(now: 9_000_000).isEmpty)
  }

  @Test func stallsPostpone() {
    var all = connections(limit: 9, groupLimit: 9)
    all.add(1, socket: 1, group: "a", now: 0)
    all.postpone(nanoseconds: 5_000_000)
    #expect(all.nextCheck == 6_000_000 && all.overdue(now: 5_900_000).isEmpty)
    #expect(all.overdue(now: 6_000_000) == [1])
  }

  @Test func namesOfGroupsAreForgotten() {
    var all = connections(limit: 9, groupLimit: 1)
    for key: UInt in 1...100 {
      all.add(key, socket: 1, group: "group \(key)", now: 0)
      #expect(all.group(of: key) == "group \(key)")
      #expect(all.verdict(group: "group \(key)", now: 0) == .instead(of: key))
      all.startClosing(key)
      #expect(all.verdict(group: "group \(key)", now: 0) == .welcome)
      all.remove(key)
      all.remove(key)
    }
    #expect(all.count == 0 && all.isEmpty)
  }
}
