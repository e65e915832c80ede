import Glibc
import MooncakeP2P
import SwarmSimulation

// Simulates swarms and writes the results as Markdown and JSON.
//
// usage: swarm-simulation [FOLDER]     writes FOLDER/swarm.md and FOLDER/swarm.json

struct Row {
  let receivers: Int
  let outcome: Outcome
  /// In units of one receiver's time.
  let makespan: Double

  func perReceiver(_ count: Int) -> Double { Double(count) / Double(receivers) }
}

func text(_ value: Double) -> String {
  let hundredths = Int((value * 100).rounded())
  let rest = hundredths % 100
  return "\(hundredths / 100).\(rest < 10 ? "0" : "")\(rest)"
}

func rows(_ counts: [Int], _ scenario: Scenario) -> [Row] {
  var one = scenario
  one.receiverCount = 1
  let unit = Double(Simulation(one).run().makespan)
  return counts.map { count in
    var many = scenario
    many.receiverCount = count
    let outcome = Simulation(many).run()
    print("\(count) receivers: \(text(Double(outcome.makespan) / unit))")
    return Row(
      receivers: count, outcome: outcome, makespan: Double(outcome.makespan) / unit)
  }
}

func swarmTable(_ rows: [Row]) -> String {
  var lines = [
    "| Receivers | Makespan | Origin sends, copies | Metadata operations a receiver |"
      + " Asks a receiver | of them refused as busy | Asks at the origin, all | Bytes a node |",
    "|--:|--:|--:|--:|--:|--:|--:|--:|",
  ]
  for row in rows {
    let outcome = row.outcome
    let cells = [
      "\(row.receivers)", text(row.makespan), text(outcome.originCopies),
      text(row.perReceiver(outcome.metadataOperations)), text(row.perReceiver(outcome.askCount)),
      text(row.perReceiver(outcome.busyCount)), "\(outcome.originAskCount)",
      "\(outcome.memoryBytes)",
    ]
    lines.append("| " + cells.joined(separator: " | ") + " |")
  }
  return lines.joined(separator: "\n")
}

func aloneTable(_ rows: [Row]) -> String {
  var lines = ["| Receivers | Makespan | Origin sends, copies |", "|--:|--:|--:|"]
  for row in rows {
    lines.append("| \(row.receivers) | \(text(row.makespan)) | \(text(row.outcome.originCopies)) |")
  }
  return lines.joined(separator: "\n")
}

func json(_ name: String, _ rows: [Row]) -> String {
  let items = rows.map { row in
    let outcome = row.outcome
    return "    {\"receivers\": \(row.receivers), \"makespan\": \(text(row.makespan)), "
      + "\"makespan_ns\": \(outcome.makespan), \"complete\": \(outcome.completeCount), "
      + "\"origin_copies\": \(text(outcome.originCopies)), "
      + "\"metadata_operations\": \(outcome.metadataOperations), \"asks\": \(outcome.askCount), "
      + "\"busy\": \(outcome.busyCount), \"origin_asks\": \(outcome.originAskCount), "
      + "\"node_bytes\": \(outcome.memoryBytes)}"
  }
  return "  \"\(name)\": [\n" + items.joined(separator: ",\n") + "\n  ]"
}

func write(_ text: String, to path: String) {
  guard let file = fopen(path, "w") else {
    print("cannot write \(path): \(String(cString: strerror(errno)))")
    exit(1)
  }
  fputs(text, file)
  fclose(file)
}

let folder = CommandLine.arguments.count > 1 ? CommandLine.arguments[1] : "benchmarks"
let base = Scenario(receiverCount: 1)
let swarm = rows([1, 8, 10, 100, 1000, 10_000], base)
var aloneScenario = base
aloneScenario.isOriginAlone = true
let alone = rows([1, 2, 4, 8, 10, 20, 50, 100], aloneScenario)
var small = base
small.shardCount = 32
let smallSwarm = rows([1, 2, 4, 8], small)

let report = """
  # The swarm, simulated

  A payload of \(base.shardCount) shards of \(base.shardBytes >> 20) MiB; every node has a link of
  \(Int(base.linkBytesPerSecond / 1e6)) MB/s up and down and \(base.latency / 1000) us of latency;
  all receivers start within \(base.startSpread / 1_000_000) ms, seed \(base.seed). The clock is
  virtual, the choices are made by the code of the store. Makespan runs from the first start to the
  last finish, in units of one receiver's time. A flow gets the smaller of its fair shares at both
  ends and leaves the rest unused, so real links do a little better.

  Metadata operations: head, one page of holders, lease, own record, its completion, and at most
  \(base.plan.discoveryLimit) further pages while few holders are known; renewals of the
  lease, which come with time, are left out.
  Bytes a node: heap of the receiver's plan and of its ledger at the end, without texts of
  addresses beyond 15 bytes.

  ## Each receiver offers what it has

  \(swarmTable(swarm))

  ## 256 MiB (32 shards)

  \(swarmTable(smallSwarm))

  ## Everything from the origin alone

  \(aloneTable(alone))

  The origin's link is the bound: N receivers take N times as long. Beyond 100 that is arithmetic
  and was not simulated.

  Made by `swift run -c release swarm-simulation benchmarks`.

  """
write(report, to: "\(folder)/swarm.md")
write(
  "{\n"
    + [json("swarm", swarm), json("swarm_256_mib", smallSwarm), json("origin_alone", alone)]
    .joined(separator: ",\n") + "\n}\n", to: "\(folder)/swarm.json")
