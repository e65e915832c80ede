import MooncakeStore
import SwarmSimulation

func text(_ value: Double) -> String {
  let hundredths = Int((value * 100).rounded())
  return "\(hundredths / 100).\(hundredths % 100 < 10 ? "0" : "")\(hundredths % 100)"
}
let arguments: [String] = CommandLine.arguments
var one = Scenario(receiverCount: 1)
var readers = 4
var atOnce = 4
func option(_ name: String) -> Int? {
  arguments.firstIndex(of: name).flatMap { $0 + 1 < arguments.count ? Int(arguments[$0 + 1]) : nil }
}
if let value = option("--shards") { one.shardCount = value }
if let value = option("--shard-kib") { one.shardBytes = UInt64(value) << 10 }
if let value = option("--readers") { one.ledger.readersAtOnce = value }
if let value = option("--at-once") { one.plan.holdersAtOnce = value }
if let value = option("--neighbors") { one.plan.neighborLimit = value }
if let value = option("--window-kib") { one.plan.windowBytes = UInt64(value) << 10 }
if let value = option("--link-mb") { one.linkBytesPerSecond = Double(value) * 1e6 }
if let value = option("--seed") { one.seed = UInt64(value) }
let unit = Double(Simulation(one).run().makespan)
print("one: \(text(unit / 1e9)) s")
for count in [8, 10, 100, 1000, 10_000] where count <= option("--max") ?? 1000 {
  var scenario = one
  scenario.receiverCount = count
  let o = Simulation(scenario).run()
  print(
    count, "makespan", text(Double(o.makespan) / unit), "origin", text(o.originCopies), "ops",
    text(Double(o.metadataOperations) / Double(count)), "asks",
    text(Double(o.askCount) / Double(count)),
    "busy", text(Double(o.busyCount) / Double(count)), "originAsks", o.originAskCount, "unused",
    o.unusedGrantCount, "cancel", o.canceledCount, "double", o.doubleCount, "gap",
    text(Double(o.longestGap) / 1e9), "mem", o.memoryBytes, "done", o.completeCount, "stuck",
    o.stuckCount)
}
