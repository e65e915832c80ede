import MooncakeP2P
import SwarmSimulation
import Testing

/// Swarms in which some nodes fail without ending. Whatever the mixture, every get ends within
/// bounds, with the bytes or a reason.
@Suite struct BadCompanyTests {
  /// The faults; each is a bit of a mixture.
  private enum Company: Int, CaseIterable {
    /// A receiver answers and grants, but sends nothing.
    case muted
    /// The first four receivers have a tenth of the link.
    case slowFirst
    /// Half of all records name dead holders.
    case deadRecords
    /// Packets above 1,500 bytes do not reach one receiver.
    case narrowed
    /// One question in a hundred is lost.
    case lossy
  }

  private static let second: UInt64 = 1_000_000_000
  private static let receivers = 8
  private static let slow = 1...4
  private static let muted = 5
  private static let narrow = 6

  private func scenario(_ mixture: Int, seed: UInt64) -> Scenario {
    var scenario = Scenario(receiverCount: Self.receivers)
    (scenario.shardCount, scenario.shardBytes) = (8, 4 << 20)
    (scenario.seed, scenario.redistributes) = (seed, true)
    scenario.limit = 300 * Self.second
    // Shorter than in production, to save simulation time.
    scenario.plan.starvedNanoseconds = 6 * Self.second
    scenario.plan.isolatedNanoseconds = 5 * Self.second
    for company in Company.allCases where mixture >> company.rawValue & 1 != 0 {
      switch company {
      case .muted:
        scenario.faults.append((node: Self.muted, time: Self.second / 10, fault: .muted))
      case .slowFirst:
        for node in Self.slow { scenario.slowNodes[node] = 0.1 }
        scenario.slowLead = Self.second
      case .deadRecords: scenario.deadRecordCount = Self.receivers
      case .narrowed: scenario.faults.append((node: Self.narrow, time: 0, fault: .narrowed))
      case .lossy: scenario.lostPerMille = 10
      }
    }
    return scenario
  }

  @Test(arguments: 0..<(1 << Company.allCases.count), [1, 2] as [UInt64])
  func everyMixtureEndsForEverybody(mixture: Int, seed: UInt64) {
    let scenario = scenario(mixture, seed: seed)
    let outcome = Simulation(scenario).run()
    let hasNarrow = scenario.faults.contains { $0.fault == .narrowed }
    #expect(outcome.completeCount == Self.receivers - (hasNarrow ? 1 : 0))
    #expect(outcome.stuckNodes == (hasNarrow ? [Self.narrow] : []))
    #expect(outcome.longestDespair < 10 * Self.second)
    #expect(outcome.doubleCount == 0)
    // 0.3 s at the full link, 2.7 s at a tenth; each muted holder costs four seconds.
    for (node, time) in outcome.durations {
      let limit = scenario.slowNodes[node] == nil ? 12 * Self.second : 30 * Self.second
      #expect(time < limit, "node \(node) took \(time) ns")
    }
  }

  @Test(arguments: [Scenario.Fault.muted, .narrowed])
  func anOriginThatSendsNothingIsFoundOut(fault: Scenario.Fault) {
    var scenario = scenario(0, seed: 1)
    // With more, some would be told that others come first, and wait longer.
    scenario.receiverCount = 4
    scenario.faults = [(node: 0, time: 0, fault: fault)]
    let outcome = Simulation(scenario).run()
    #expect(outcome.stuckCount == 4)
    #expect(outcome.longestDespair < 10 * Self.second)
  }

  @Test(arguments: [0, 1] as [UInt64])
  func slowReadersWhoComeFirstKeepNobodyWaiting(lead: UInt64) {
    var alone = Scenario(receiverCount: 8)
    (alone.shardCount, alone.redistributes) = (48, true)
    var scenario = alone
    scenario.receiverCount = 12
    for node in 1...4 { scenario.slowNodes[node] = 0.05 }
    scenario.slowLead = lead * Self.second
    let outcome = Simulation(scenario).run()
    #expect(outcome.completeCount == 12)
    let fast = outcome.durations.filter { $0.key > 4 }.values.max() ?? .max
    #expect(Double(fast) < 1.5 * Double(Simulation(alone).run().makespan))
    // Alone they would need 64 s.
    #expect(outcome.durations.values.max() ?? .max < 80 * Self.second, "nor do they starve")
  }

  @Test(arguments: [(4, 4), (4, 16), (16, 16)], [0, 1, 5, 10] as [UInt64])
  func fastOnesBehindSlowOnesTakeLittleLonger(counts: (slow: Int, fast: Int), lead: UInt64) {
    var alone = Scenario(receiverCount: counts.fast)
    (alone.shardCount, alone.redistributes) = (48, true)
    var scenario = alone
    scenario.receiverCount = counts.slow + counts.fast
    for node in 1...counts.slow { scenario.slowNodes[node] = 0.02 }
    scenario.slowLead = lead * Self.second
    let outcome = Simulation(scenario).run()
    #expect(outcome.completeCount == counts.slow + counts.fast)
    let fast = outcome.durations.filter { $0.key > counts.slow }.values.max() ?? .max
    #expect(Double(fast) < 1.5 * Double(Simulation(alone).run().makespan))
    // Alone they would need 161 s.
    #expect(outcome.durations.values.max() ?? .max < 175 * Self.second)
  }

  @Test func withoutAHolderThatLivesTheDeadHoldNobodyUp() {
    var scenario = scenario(0, seed: 2)
    scenario.receiverCount = 1
    scenario.deadRecordCount = 15
    let outcome = Simulation(scenario).run()
    #expect(outcome.completeCount == 1)
    #expect(outcome.makespan < Self.second)
  }
}
