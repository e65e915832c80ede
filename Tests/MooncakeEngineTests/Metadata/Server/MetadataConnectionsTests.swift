import MooncakeEngine
import Testing

struct MetadataConnectionsTests {
  private func connections(limit: Int, groupLimit: Int) -> MetadataConnections {
    MetadataConnections(limit: limit, groupLimit: groupLimit, patienceMilliseconds: 1)
  }

  private func answer(_ key: UInt, _ all: inout MetadataConnections, now: UInt64) {
    for phase: MetadataConnections.Phase in [.body, .work, .answer, .head] {
      all.enter(phase, key, now: now)
    }
  }

  @Test func theCrowdGivesWayFirst() {
    var all = connections(limit: 4, groupLimit: 3)
    all.add(1, socket: 1, group: "few", now: 10)
    all.add(2, socket: 2, group: "many", now: 30)
    all.add(3, socket: 3, group: "many", now: 20)
    #expect(all.verdict(group: "few") == .welcome)
    all.add(4, socket: 4, group: "many", now: 5)
    answer(4, &all, now: 6)
    // Who has been answered before stays longer than who has only ever been slow.
    #expect(all.verdict(group: "few") == .instead(of: 3))
    all.startClosing(3)
    #expect(all.verdict(group: "few") == .welcome && all.count == 3)
    all.add(5, socket: 5, group: "many", now: 40)
    #expect(all.verdict(group: "few") == .instead(of: 2))
    all.enter(.work, 2, now: 50)
    all.enter(.work, 5, now: 50)
    #expect(all.verdict(group: "few") == .instead(of: 4))
    all.enter(.work, 4, now: 50)
    #expect(all.verdict(group: "many") == .refused)
    #expect(all.verdict(group: "few") == .instead(of: 1) && !all.isFull)
    all.enter(.work, 1, now: 50)
    #expect(all.verdict(group: "few") == .full && all.isFull)
    all.remove(3)
    all.remove(2)
    #expect(all.verdict(group: "few") == .welcome && all.count == 3)
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
}
