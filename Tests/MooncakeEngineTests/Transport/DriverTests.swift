import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

@Suite struct DriverTests {
  private class Counted: @unchecked Sendable {
    // Unchecked: only one thread uses it.
    var kicks = 0
    var sweeps = 0
    var polls = 0

    func kick() { kicks += 1 }
    func nudge() { kicks += 1 }
    func requestSweep() { sweeps += 1 }
    func pollIfFree() -> Bool {
      polls += 1
      return true
    }
    func driveIfFree(until deadline: Deadline, isDone: () -> Bool) -> Bool { pollIfFree() }
  }

  private final class Loop: Counted, Driver, @unchecked Sendable {
    static let isExclusive = true
  }

  private final class CopyQueue: Counted, Driver, @unchecked Sendable {
    static let isExclusive = false
  }

  private func set(_ bits: Int?...) throws -> DriverSet {
    var set = DriverSet()
    for bit in bits { set.insert(try #require(bit)) }
    return set
  }

  @Test func waitersDriveTheOnlyLoop() throws {
    let table = DriverTable()
    let (first, second, queue) = (Loop(), Loop(), CopyQueue())
    let (one, two, many) = (table.add(first), table.add(second), table.add(queue))
    #expect(try table.onlyExclusive(of: set(one)) === first)
    #expect(try table.onlyExclusive(of: set(two, many)) === second)
    #expect(try table.onlyExclusive(of: set(one, two)) == nil)
    #expect(try table.onlyExclusive(of: set(many)) == nil)
    #expect(try table.hasCooperative(set(one, many)) && !table.hasCooperative(set(one, two)))
    #expect(try table.help(set(one, many)) && !table.help(set(one, two)))
    #expect(first.polls == 0 && queue.polls == 1)
    table.kickExclusive(try set(two, many))
    #expect(first.kicks == 0 && second.kicks == 1 && queue.kicks == 0)
  }

  /// More loops than a set has bits for: the last ones share a bit, none is forgotten, and a queue
  /// that is added after them is still helped.
  @Test func manyLoops() throws {
    let table = DriverTable()
    let loops = (0..<DriverTable.exclusiveLimit).map { _ in Loop() }
    let bits = try loops.map { try #require(table.add($0)) }
    #expect(table.add(Loop()) == nil)
    let queue = CopyQueue()
    let many = try #require(table.add(queue))
    #expect(!bits.contains(many))
    #expect(try table.help(set(many)) && queue.polls == 1)
    #expect(try table.onlyExclusive(of: set(bits[0])) === loops[0])
    #expect(try table.onlyExclusive(of: set(bits[127])) == nil)
    table.kickExclusive(try set(bits[127]))
    #expect(loops[127].kicks == 1 && loops[0].kicks == 0)
    table.requestSweeps()
    #expect(loops.allSatisfy { $0.sweeps == 1 } && queue.sweeps == 1)
    for _ in 1..<DriverTable.cooperativeLimit { #expect(table.add(CopyQueue()) != nil) }
    #expect(table.add(CopyQueue()) == nil)
  }
}
