/// What a receiver asks a holder for: permission to read some of the shards that it lacks.
package struct ShardRequest: Equatable, Sendable {
  /// The holding that is asked.
  package var holding: UInt64
  package var version: PayloadVersion
  /// Random for each `get`; the same in all questions of one receiver.
  package var reader: UInt64
  /// The receiver as a holder, to be named to others; nil if it offers nothing.
  package var own: HolderAddress?
  /// What it has or is already reading; empty with `wanted`.
  package var have: ShardSet
  /// Only these shards, for reading a range; nil to let the holder choose.
  package var wanted: Range<Int>?
  /// Numbers the receiver's requests: a holder ignores those that are older than the latest.
  package var turn: UInt64
  /// The shards granted by this holder that it is still reading; all other grants are given back.
  /// Every request lists all of them, so that a lost question or answer leaves no grant behind.
  package var reading: [Int]
  /// How many shards it would like to read; 0 asks for none.
  package var limit: Int

  package init(
    holding: UInt64, version: PayloadVersion, reader: UInt64, own: HolderAddress?, have: ShardSet,
    wanted: Range<Int>? = nil, turn: UInt64, reading: [Int], limit: Int
  ) {
    self.holding = holding
    self.version = version
    self.reader = reader
    self.own = own
    self.have = have
    self.wanted = wanted
    self.turn = turn
    self.reading = reading
    self.limit = limit
  }

  /// A receiver's last request to a holder: it no longer reads anything.
  package static func farewell(
    to holder: HolderAddress, version: PayloadVersion, reader: UInt64, shardCount: Int
  ) -> ShardRequest {
    ShardRequest(
      holding: holder.holding, version: version, reader: reader, own: nil,
      have: ShardSet(count: shardCount), turn: .max, reading: [], limit: 0)
  }
}

/// What a holder answers.
package struct ShardAnswer: Equatable, Sendable {
  package enum State: UInt64, Sendable {
    /// Serves; what was granted may be read now.
    case serving = 0
    /// Serves others; ask again after `retryMilliseconds`.
    case busy = 1
    /// Holds this no longer, or never did.
    case gone = 2
  }
  package var state: State
  /// Shards that may be read from now on, until they are given back or for `leaseMilliseconds`.
  package var granted: [Int]
  package var leaseMilliseconds: UInt64
  package var retryMilliseconds: UInt64
  /// How many shards the holder has.
  package var heldCount: Int
  /// Receivers that read from it now.
  package var readerCount: Int
  /// Others that hold some of it.
  package var peers: [HolderAddress]

  package init(
    state: State, granted: [Int] = [], leaseMilliseconds: UInt64 = 0,
    retryMilliseconds: UInt64 = 0, heldCount: Int = 0, readerCount: Int = 0,
    peers: [HolderAddress] = []
  ) {
    self.state = state
    self.granted = granted
    self.leaseMilliseconds = leaseMilliseconds
    self.retryMilliseconds = retryMilliseconds
    self.heldCount = heldCount
    self.readerCount = readerCount
    self.peers = peers
  }
}
