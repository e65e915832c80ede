import MooncakeP2P
import SwarmSimulation
import Testing

/// Whole swarms with faults. Each run is reproducible, and a failure names its seed.
@Suite struct SwarmTests {
  private func time(of scenario: Scenario) -> UInt64 {
    var one = scenario
    one.receiverCount = 1
    one.faults = []
    return Simulation(one).run().makespan
  }

  private func scenario(_ receivers: Int, seed: UInt64) -> Scenario {
    var scenario = Scenario(receiverCount: receivers)
    scenario.shardCount = 64
    scenario.seed = seed
    return scenario
  }

  private func expectAllDone(_ outcome: Outcome, _ scenario: Scenario, failed: Int = 0) {
    #expect(outcome.failedCount == failed, "seed \(scenario.seed)")
    #expect(outcome.completeCount == scenario.receiverCount - failed, "seed \(scenario.seed)")
    #expect(outcome.stuckCount == 0, "seed \(scenario.seed)")
    #expect(outcome.doubleCount == 0, "seed \(scenario.seed)")
    #expect(outcome.metadataOperations <= scenario.receiverCount * 9, "seed \(scenario.seed)")
  }

  @Test(arguments: 1...4 as ClosedRange<UInt64>) func eightAsFastAsOne(seed: UInt64) {
    var scenario = scenario(8, seed: seed)
    scenario.shardCount = 128
    let outcome = Simulation(scenario).run()
    expectAllDone(outcome, scenario)
    #expect(Double(outcome.makespan) < 1.25 * Double(time(of: scenario)))
    #expect(outcome.originCopies < 1.5)
    #expect(outcome.corruptCount == 0)
  }

  @Test(arguments: 1...3 as ClosedRange<UInt64>) func aHundredInLittleMoreThanOne(seed: UInt64) {
    var scenario = scenario(100, seed: seed)
    scenario.shardCount = 128
    let outcome = Simulation(scenario).run()
    expectAllDone(outcome, scenario)
    #expect(Double(outcome.makespan) < 1.32 * Double(time(of: scenario)))
  }

  @Test func aRunRepeats() {
    let scenario = scenario(10, seed: 7)
    let first = Simulation(scenario).run()
    let second = Simulation(scenario).run()
    #expect(first.makespan == second.makespan)
    #expect(first.askCount == second.askCount)
  }

  @Test(arguments: [10, 100], [1, 2, 3] as [UInt64])
  func killedAndSilentHolders(receivers: Int, seed: UInt64) {
    var scenario = scenario(receivers, seed: seed)
    for number in 0..<(receivers / 5) {
      scenario.faults.append(
        (
          node: 1 + number * 5, time: 1_000_000_000 + UInt64(number) * 150_000_000,
          fault: number % 2 == 0 ? .killed : .silenced
        ))
    }
    let outcome = Simulation(scenario).run()
    expectAllDone(outcome, scenario, failed: receivers / 5)
    #expect(Double(outcome.makespan) < 2.5 * Double(time(of: scenario)))
  }

  @Test(arguments: [10, 100], [1, 2] as [UInt64])
  func corruptHoldersAreAvoided(receivers: Int, seed: UInt64) {
    var scenario = scenario(receivers, seed: seed)
    scenario.corruptNodes = Set((0..<(receivers / 10)).map { 2 + $0 * 10 })
    let outcome = Simulation(scenario).run()
    expectAllDone(outcome, scenario)
    #expect(outcome.corruptCount > 0)
    // Shards already in flight from it still count: a window of shards at most.
    #expect(outcome.corruptCount <= receivers * scenario.corruptNodes.count * 2)
  }

  @Test(arguments: [10, 100], [1, 2] as [UInt64])
  func slowHoldersHoldNobodyUp(receivers: Int, seed: UInt64) {
    var scenario = scenario(receivers, seed: seed)
    let alone = time(of: scenario)
    // A tenth of the nodes send and receive at a fiftieth: the others must not wait for them.
    for number in 0..<(receivers / 10) { scenario.slowNodes[3 + number * 10] = 0.02 }
    scenario.limit = alone * 3
    let outcome = Simulation(scenario).run()
    #expect(outcome.completeCount == receivers - receivers / 10, "seed \(seed)")
  }

  @Test(arguments: [10, 100], [Scenario.Fault.killed, .silenced])
  func theOriginFailsAfterTheFirstCopy(receivers: Int, fault: Scenario.Fault) {
    var scenario = scenario(receivers, seed: 5)
    scenario.originFault = fault
    let outcome = Simulation(scenario).run()
    expectAllDone(outcome, scenario)
  }

  @Test(arguments: [Scenario.Fault.killed, .silenced])
  func theOriginFailsTooEarly(fault: Scenario.Fault) {
    var scenario = scenario(10, seed: 6)
    scenario.faults = [(node: 0, time: 1_500_000_000, fault: fault)]
    let outcome = Simulation(scenario).run()
    #expect(outcome.completeCount == 0)
    #expect(outcome.stuckCount == 10, "everyone must find out that nobody has the rest")
  }

  @Test(arguments: [Scenario.Fault.killed, .silenced])
  func aFailedHolderCostsLessThanASecond(fault: Scenario.Fault) {
    var scenario = scenario(3, seed: 8)
    scenario.faults = [(node: 2, time: 2_000_000_000, fault: fault)]
    let outcome = Simulation(scenario).run()
    expectAllDone(outcome, scenario, failed: 1)
    #expect(outcome.longestGap < 1_000_000_000)
  }

  @Test func oneReceiverTakesEachShardOnce() {
    let scenario = scenario(1, seed: 9)
    let outcome = Simulation(scenario).run()
    expectAllDone(outcome, scenario)
    #expect(outcome.readCount == scenario.shardCount)
    #expect(outcome.unusedGrantCount == 0)
    let ideal = Double(scenario.payloadBytes) / scenario.linkBytesPerSecond * 1e9
    #expect(Double(outcome.makespan) < 1.02 * ideal, "the link must never idle")
  }
}
