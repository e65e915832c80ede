import MooncakeStore
import Testing

@Suite struct UploadLedgerTests {
  private let full = ShardSet(count: 100, isFull: true)
  private let second: UInt64 = 1_000_000_000
  private let lastTurn = Counter()

  private final class Counter {
    var value: UInt64 = 0
  }

  /// Said after all others, unless it is given a turn.
  private func request(
    _ reader: UInt64, limit: Int = 2, have: ShardSet? = nil, wanted: Range<Int>? = nil,
    reading: [Int] = [], own: HolderAddress? = nil, turn: UInt64? = nil
  ) -> ShardRequest {
    lastTurn.value += 1
    return ShardRequest(
      holding: 1, version: PayloadVersion(high: 1, low: 2), reader: reader, own: own,
      have: have ?? ShardSet(count: 100), wanted: wanted, turn: turn ?? lastTurn.value,
      reading: reading, limit: limit)
  }

  private func holder(_ number: UInt64) -> HolderAddress {
    HolderAddress(holding: number, rpc: "host:\(number)", segment: "s\(number)")
  }

  @Test func eachShardOnceBeforeAnyTwice() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    var granted: [Int] = []
    for _ in 0..<25 {
      for reader in 1...4 as ClosedRange<UInt64> {
        granted += ledger.answer(request(reader, limit: 1), available: full, now: 0).granted
      }
    }
    #expect(granted.count == 100)
    #expect(Set(granted).count == 100)
    #expect(granted != granted.sorted(), "receivers must get shards in no fixed order")
  }

  @Test func readersAreBounded() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    for reader in 1...4 as ClosedRange<UInt64> {
      #expect(ledger.answer(request(reader), available: full, now: 0).state == .serving)
    }
    let refused = ledger.answer(request(5), available: full, now: 0)
    #expect(refused.state == .busy)
    #expect(refused.granted == [])
    #expect(refused.retryMilliseconds > 0)
    #expect(ledger.answer(request(1), available: full, now: 0).state == .serving)
  }

  @Test func whoNamesShardsGetsThroughWithinBounds() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    for reader in 1...4 as ClosedRange<UInt64> {
      _ = ledger.answer(request(reader), available: full, now: 0)
    }
    var served = 0
    for reader in 10...30 as ClosedRange<UInt64> {
      let answer = ledger.answer(request(reader, wanted: 7..<8), available: full, now: 0)
      if answer.state == .serving {
        #expect(answer.granted == [7])
        served += 1
      }
    }
    #expect(served == 4)
  }

  @Test func grantsExpireAndAskingRenews() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    let granted = ledger.answer(request(1), available: full, now: 0).granted
    _ = ledger.answer(request(2, limit: 3), available: full, now: 0)
    #expect(ledger.outstandingCount(now: 9 * second) == 5)
    _ = ledger.answer(request(1, limit: 0, reading: granted), available: full, now: 9 * second)
    #expect(ledger.outstandingCount(now: 11 * second) == 2)
    #expect(ledger.outstandingCount(now: 19 * second) == 0)
  }

  /// Its answer was lost, or what it granted could not be read.
  @Test func whatIsNotReadIsGrantedAgain() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    let wanted = ledger.answer(request(1, limit: 3, wanted: 4..<7), available: full, now: 0)
    #expect(Set(wanted.granted) == [4, 5, 6])
    let again = ledger.answer(
      request(1, limit: 3, wanted: 4..<6, reading: [6]), available: full, now: second)
    #expect(Set(again.granted) == [4, 5])
    #expect(ledger.outstandingCount(now: second) == 3)
  }

  @Test func whatComesLateChangesNothing() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    let first = ledger.answer(request(1, limit: 3, turn: 7), available: full, now: 0)
    for turn in 6...7 as ClosedRange<UInt64> {
      let late = ledger.answer(request(1, turn: turn), available: full, now: 9 * second)
      #expect(late == ShardAnswer(state: .busy))
    }
    #expect(ledger.outstandingCount(now: 9 * second) == first.granted.count)
    #expect(ledger.outstandingCount(now: 10 * second) == 0, "nor does it renew")
  }

  @Test func withdrawalDrains() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    let granted = ledger.answer(request(1, limit: 3), available: full, now: 0).granted
    ledger.withdraw()
    #expect(ledger.outstandingCount(now: second) == 3)
    let answer = ledger.answer(
      request(1, reading: [granted[2]]), available: full, now: second)
    #expect(answer == ShardAnswer(state: .gone))
    #expect(ledger.outstandingCount(now: second) == 1)
    _ = ledger.answer(request(1), available: full, now: second)
    #expect(ledger.outstandingCount(now: second) == 0)
    #expect(ledger.lastExpiry == 0)
  }

  @Test func onlyWhatIsThereAndMissing() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    var available = ShardSet(count: 100)
    for shard in [3, 64, 99] { available.insert(shard) }
    var have = ShardSet(count: 100)
    have.insert(64)
    let answer = ledger.answer(request(1, limit: 10, have: have), available: available, now: 0)
    #expect(Set(answer.granted) == [3, 99])
    #expect(answer.heldCount == 3)
  }

  @Test func peersAreToldAndBounded() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    for number in 1...1000 as ClosedRange<UInt64> {
      let answer = ledger.answer(
        request(number, limit: 0, own: holder(number)), available: full, now: 0)
      #expect(answer.peers.count == min(8, Int(number) - 1))
      #expect(!answer.peers.contains(holder(number)))
    }
    let late = ledger.answer(request(1, limit: 0), available: full, now: 31 * second)
    #expect(late.peers.isEmpty, "long silent peers must not be told")
  }

  @Test func strangeRequestsAreHarmless() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    let other = request(1, have: ShardSet(count: 7))
    #expect(ledger.answer(other, available: full, now: 0).state == .gone)
    let strange = request(1, limit: -5, reading: [-1, 5000])
    #expect(ledger.answer(strange, available: full, now: 0).granted == [])
    let greedy = ledger.answer(request(1, limit: .max), available: full, now: 0)
    #expect(greedy.granted.count == 64)
    let more = request(1, limit: .max, reading: greedy.granted)
    #expect(ledger.answer(more, available: full, now: 0).granted == [])
    #expect(
      ledger.answer(request(2, wanted: 300..<400), available: full, now: .max).granted == [])
  }

  @Test func theRefusedComeTheLaterTheMoreTheyAre() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    for reader in 1...4 as ClosedRange<UInt64> {
      _ = ledger.answer(request(reader), available: full, now: 0)
    }
    let first = ledger.answer(request(5), available: full, now: 0).retryMilliseconds
    for reader in 6...900 as ClosedRange<UInt64> {
      _ = ledger.answer(request(reader), available: full, now: 0)
    }
    let last = ledger.answer(request(901), available: full, now: 0).retryMilliseconds
    #expect(first < 100)
    #expect(last > 1000)
  }
}
