import MooncakeP2P

/// A scenario to simulate. Times are nanoseconds since publication.
package struct Scenario: Sendable {
  package enum Fault: Sendable {
    /// The process ends: its connections break at once.
    case killed
    /// The machine ends: it no longer answers.
    case silenced
    /// It answers and grants, but never sends a byte of a shard.
    case muted
    /// No packet above 1,500 bytes gets through in either direction: no shard, no long question, no
    /// long answer.
    case narrowed
  }

  package var receiverCount: Int
  package var shardCount = 128
  package var shardBytes: UInt64 = 8 << 20
  /// Of every node, up and down alike.
  package var linkBytesPerSecond = 125e6
  package var latency: UInt64 = 200_000
  /// Time that a holder's RPC thread spends on an answer, one after the other.
  package var askCost: UInt64 = 50_000
  /// Receivers start at random times up to this.
  package var startSpread: UInt64 = 100_000_000
  package var seed: UInt64 = 1
  /// Every receiver fetches only from the origin, which serves all at once.
  package var isOriginAlone = false
  package var faults: [(node: Int, time: UInt64, fault: Fault)] = []
  /// How the origin fails once some receiver is complete.
  package var originFault: Fault?
  /// Every shard of these nodes is wrong.
  package var corruptNodes: Set<Int> = []
  /// Nodes that have only a fraction of the link.
  package var slowNodes: [Int: Double] = [:]
  /// Whether the unused part of a flow's share of a link goes to the other flows there.
  package var redistributes = false
  /// The slow nodes start this much before all others.
  package var slowLead: UInt64 = 0
  /// Records of dead holders, which never answer.
  package var deadRecordCount = 0
  /// How many questions of 1,000, or their answers, are lost.
  package var lostPerMille: UInt64 = 0
  package var ledger = UploadLedger.Settings()
  package var plan = DownloadPlan.Settings()
  /// Simulated time after which a run is given up.
  package var limit: UInt64 = 3_600_000_000_000

  package init(receiverCount: Int) { self.receiverCount = receiverCount }

  package var payloadBytes: UInt64 { UInt64(shardCount) * shardBytes }
}

/// The results of a run.
package struct Outcome: Sendable {
  /// From the first start to the last finish.
  package var makespan: UInt64 = 0
  package var completeCount = 0
  /// Receivers that gave up because they found nobody.
  package var stuckCount = 0
  /// Nodes that gave up, and the longest time that one of them took from its start.
  package var stuckNodes: Set<Int> = []
  package var longestDespair: UInt64 = 0
  /// When each node was complete, from its start.
  package var durations: [Int: UInt64] = [:]
  package var failedCount = 0
  package var originCopies = 0.0
  package var metadataOperations = 0
  package var askCount = 0
  package var originAskCount = 0
  package var busyCount = 0
  package var corruptCount = 0
  /// Shards reported as new although they were already there.
  package var doubleCount = 0
  /// Grants that never became reads.
  package var unusedGrantCount = 0
  package var readCount = 0
  package var canceledCount = 0
  /// Longest time a receiver went without a shard after its first.
  package var longestGap: UInt64 = 0
  /// Heap bytes of plan and ledger, mean per receiver.
  package var memoryBytes = 0
}
