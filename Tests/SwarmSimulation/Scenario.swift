import MooncakeP2P

/// What is simulated. Times are nanoseconds from the publication.
package struct Scenario: Sendable {
  package enum Fault: Sendable {
    /// The process ends: its connections break at once.
    case killed
    /// The machine ends: nobody answers any more.
    case silenced
    /// It answers and grants, but no byte of a shard leaves it any more.
    case muted
    /// No packet of more than 1,500 bytes gets through, in either direction: no shard, no long
    /// question, no long answer.
    case narrowed
  }

  package var receiverCount: Int
  package var shardCount = 128
  package var shardBytes: UInt64 = 8 << 20
  /// Of every node, up and down alike.
  package var linkBytesPerSecond = 125e6
  package var latency: UInt64 = 200_000
  /// What an answer costs a holder's RPC thread, one after the other.
  package var askCost: UInt64 = 50_000
  /// Receivers start at random times up to here.
  package var startSpread: UInt64 = 100_000_000
  package var seed: UInt64 = 1
  /// Every receiver fetches from the origin only, and the origin serves all at once.
  package var isOriginAlone = false
  package var faults: [(node: Int, time: UInt64, fault: Fault)] = []
  /// The origin fails when some receiver is complete.
  package var originFault: Fault?
  /// Every shard of these nodes is wrong.
  package var corruptNodes: Set<Int> = []
  /// Nodes with a fraction of the link.
  package var slowNodes: [Int: Double] = [:]
  /// Whether what a flow leaves of its share of a link goes to the other flows there.
  package var redistributes = false
  /// The slow ones begin so long before all others.
  package var slowLead: UInt64 = 0
  /// Records of holders that are no more and answer nobody.
  package var deadRecordCount = 0
  /// How many of 1,000 questions are lost, or their answers.
  package var lostPerMille: UInt64 = 0
  package var ledger = UploadLedger.Settings()
  package var plan = DownloadPlan.Settings()
  /// Simulated time after which a run is given up.
  package var limit: UInt64 = 3_600_000_000_000

  package init(receiverCount: Int) { self.receiverCount = receiverCount }

  package var payloadBytes: UInt64 { UInt64(shardCount) * shardBytes }
}

/// What came out.
package struct Outcome: Sendable {
  /// From the first start to the last finish.
  package var makespan: UInt64 = 0
  package var completeCount = 0
  /// Receivers that gave up, having found nobody.
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
  /// Shards that were reported new although they were there.
  package var doubleCount = 0
  /// Grants that never became reads.
  package var unusedGrantCount = 0
  package var readCount = 0
  package var canceledCount = 0
  /// Longest time a receiver went without a shard from its first one on.
  package var longestGap: UInt64 = 0
  /// Heap bytes of plan and ledger, a receiver's mean.
  package var memoryBytes = 0
}
