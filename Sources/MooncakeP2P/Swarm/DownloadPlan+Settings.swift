extension DownloadPlan {
  /// Limits and times of a download.
  package struct Settings: Sendable {
    package var neighborLimit = 16
    /// Holders that are asked or read at once.
    package var activeHolderLimit = 4
    /// What a holder grants ahead: at least two shards and at most `windowShardLimit`.
    package var windowBytes: UInt64 = 16 << 20
    /// The same in time, for a holder so fast that asking for `windowBytes` at a time would slow it
    /// down.
    package var windowSeconds = 0.03
    package var windowShardLimit = 64
    /// For a holder that has not sent a correct shard yet: all of its shards may be corrupt.
    package var unprovenShardLimit = 4
    /// Holders kept in reserve for when a neighbor proves useless.
    package var candidateLimit = 32
    /// Lookups in the metadata service while any neighbor is alive.
    package var discoveryLimit = 4
    /// Gives up after this time without a byte and without a living neighbor; longer than a network
    /// needs to come back.
    package var isolatedNanoseconds: UInt64 = 10_000_000_000
    /// The same if every known holder has sent wrong bytes or no longer has the payload.
    package var corruptNanoseconds: UInt64 = 2_000_000_000
    /// Has no source after this time without a byte and without a holder that may send one; also
    /// how long an unanswered question counts as hope.
    package var sourcelessNanoseconds: UInt64 = 500_000_000
    /// Gives up after this time without a byte although neighbors are alive.
    package var starvedNanoseconds: UInt64 = 15_000_000_000
    /// The same if the neighbors say that they serve others first.
    package var queuedNanoseconds: UInt64 = 120_000_000_000
    /// Probes that a silent holder may answer, without sending a byte, before it is given up; the
    /// pauses between them double.
    package var probeLimit = 4
    /// One more holder is asked or read at once for each such time without a whole shard.
    package var trialNanoseconds: UInt64 = 1_000_000_000
    /// How long an unanswered question counts toward `activeHolderLimit`.
    package var lateNanoseconds: UInt64 = 200_000_000
    /// The same while nothing is being read.
    package var firstLateNanoseconds: UInt64 = 50_000_000
    /// How often one shard may be moved away from a slow holder.
    package var moveLimit = 3

    package init() {}

    // Not to be varied: the same in every download.

    static let questionMilliseconds: UInt64 = 2000
    /// For a holder that is being read: its silence is noticed otherwise.
    static let readingQuestionMilliseconds: UInt64 = 400
    /// Pause after a failure that may have been chance; it doubles for an origin.
    static let retryMilliseconds: UInt64 = 100
    static let retryLimitMilliseconds: UInt64 = 1000
    static let retryDoublingLimit = 5
    /// Failed reads in a row after which a holder is given up.
    static let failureLimit = 3
    /// Pause after a refusal, doubling, and the longest that a holder may ask for.
    static let refusalMilliseconds: UInt64 = 50
    static let refusalDoublingLimit = 3
    static let refusalLimitMilliseconds: UInt64 = 5000
    /// Refusals in a row after which another holder is tried instead.
    static let refusalLimit = 3
    /// Pauses are multiplied by a random factor, so that receivers do not ask in step.
    static let pauseFactor = (least: 0.75, spread: 0.5)
    /// At least so many shards are granted ahead, however large they are.
    static let windowShardMinimum: UInt64 = 2
    /// Speeds beyond it are not believed.
    static let speedLimit = 1e12
    /// A holder without any shard is asked last.
    static let emptyHolderSpeed = 1.0
    /// Factors by which an origin, and a holder that has answered before, are preferred.
    static let originPreference = 0.5
    static let answeringPreference = 2.0
    static let preferenceFactor = (least: 0.5, spread: 0.5)
    /// Between two attempts to move one of the last shards to another holder.
    static let movePauseNanoseconds: UInt64 = 50_000_000
    /// Holders beyond `activeHolderLimit` that may take over one of the last shards.
    static let extraMoveHolders = 2
    /// A move must save this much more than the time that the new holder needs.
    static let leastMoveGainSeconds = 0.05
    /// A holder from which nothing was counted for so many times what it should need counts as
    /// stuck.
    static let overdueFactor = 4.0
  }
}
