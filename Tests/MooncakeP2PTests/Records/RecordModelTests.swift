import Glibc
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Testing

/// Whatever happened before, lists, watches and removals agree in the end. A failure names its
/// seed; MOONCAKE_STRESS_SEED runs only that one and prints what happens, and
/// MOONCAKE_STRESS_SECONDS tries further seeds for that long.
@Suite struct RecordModelTests {
  private static let seedCount: UInt64 = 80
  private static let stepCount = 200

  private static func number(_ variable: String) -> UInt64? {
    getenv(variable).flatMap { UInt64(String(cString: $0)) }
  }

  /// Returns how many steps were made, and for how many names the expected end was known.
  private func check(
    seed: UInt64, isTraced: Bool = false
  ) throws -> (steps: Int, expected: Int) {
    let model = try RecordModel(seed: seed)
    model.isTraced = isTraced
    model.run(stepCount: Self.stepCount)
    let wrong = try model.settle()
    #expect(wrong.isEmpty, "MOONCAKE_STRESS_SEED=\(seed): \(wrong.joined(separator: "; "))")
    return (model.stepCount, model.expectedCount)
  }

  @Test func whatIsToldIsWhatIsListed() throws {
    if let seed = Self.number("MOONCAKE_STRESS_SEED") {
      _ = try check(seed: seed, isTraced: true)
      return
    }
    var (stepCount, expectedCount) = (0, 0)
    for seed in 1...Self.seedCount {
      let (steps, expected) = try check(seed: seed)
      stepCount += steps
      expectedCount += expected
    }
    #expect(stepCount >= 10_000 && expectedCount >= 20, "\(expectedCount) names")
    let end = Deadline.after(milliseconds: (Self.number("MOONCAKE_STRESS_SECONDS") ?? 0) * 1000)
    var seed = Self.seedCount
    while !end.hasPassed {
      seed += 1
      _ = try check(seed: seed)
    }
  }
}
