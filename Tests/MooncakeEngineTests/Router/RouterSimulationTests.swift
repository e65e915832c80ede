import MooncakeSystem
import MooncakeTestSupport
import Testing

/// The router in many small worlds, compared with a model of memory. `MOONCAKE_ROUTER_SEED` repeats
/// one of them and tells what happens in it; `MOONCAKE_ROUTER_RUNS` sets their number.
struct RouterSimulationTests {
  private static let runCount = Sanitizer.isAny ? 1_000 : 10_000

  @Test func randomRuns() {
    if let seed = Environment["MOONCAKE_ROUTER_SEED"].flatMap({ UInt64($0) }) {
      for violation in RouterScenario(seed: seed, isTraced: true).run() {
        Issue.record("seed \(seed): \(violation)")
      }
      return
    }
    let count = Environment["MOONCAKE_ROUTER_RUNS"].flatMap { Int($0) } ?? Self.runCount
    let first = UInt64.random(in: 0...UInt64.max >> 1)
    var failedCount = 0
    for seed in first..<first + UInt64(count) {
      let violations = RouterScenario(seed: seed).run()
      if violations.isEmpty { continue }
      Issue.record("MOONCAKE_ROUTER_SEED=\(seed): \(violations.joined(separator: "; "))")
      failedCount += 1
      if failedCount == 5 { return }
    }
  }
}
