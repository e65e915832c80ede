import MooncakeP2P
import Testing

@Suite struct UploadLedgerTests {
  private let full = ShardSet(count: 100, isFull: true)
  private let second: UInt64 = 1_000_000_000
  private let lastTurn = Counter()

  private final class Counter {
    var value: UInt64 = 0
  }

  /// A request numbered after all others, unless a number is given.
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

  /// Nine readers that keep reading a range, and one that gets the payload.
  @Test func whoNamesShardsKeepsNobodyElseAway() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    for round in 0..<50 as Range<UInt64> {
      let now = round * second / 10
      for number in 0..<9 as Range<UInt64> {
        // Each read is a new reader, and the previous one's grant has been returned.
        _ = ledger.answer(
          request(100 + (round - min(round, 1)) * 9 + number, limit: 0, wanted: 0..<0),
          available: full, now: now)
        _ = ledger.answer(
          request(100 + round * 9 + number, wanted: 7..<8), available: full, now: now)
      }
      for reader in 1...4 as ClosedRange<UInt64> {
        let answer = ledger.answer(request(reader), available: full, now: now)
        #expect(answer.state == .serving)
      }
    }
    // And the reverse.
    var busy = UploadLedger(shardCount: 100, seed: 1)
    for reader in 1...60 as ClosedRange<UInt64> {
      _ = busy.answer(request(reader), available: full, now: reader * second)
    }
    let named = busy.answer(request(100, wanted: 7..<8), available: full, now: 61 * second)
    #expect(named.granted == [7])
  }

  @Test func whoHasWaitedLongForNamedShardsComesFirst() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    let holders: [UInt64] = [1, 2, 3, 4]
    for reader in holders {
      let answer = ledger.answer(request(reader, wanted: 7..<8), available: full, now: 0)
      #expect(answer.granted == [7])
    }
    for time in 0...11 as ClosedRange<UInt64> {
      for reader in holders {
        _ = ledger.answer(
          request(reader, limit: 0, reading: [7]), available: full, now: time * second)
      }
      let answer = ledger.answer(
        request(10, wanted: 7..<8), available: full, now: time * second)
      #expect(answer.state == .busy && answer.retryMilliseconds >= 20)
    }
    _ = ledger.answer(request(1, limit: 0), available: full, now: 11 * second)
    // A place is free, but not for the latest arrival.
    let late = ledger.answer(request(11, wanted: 7..<8), available: full, now: 11 * second)
    #expect(late.state == .busy)
    let first = ledger.answer(request(10, wanted: 7..<8), available: full, now: 11 * second)
    #expect(first.granted == [7])
  }

  /// A request for shards by name is no way around the queue.
  @Test func aNamedShardIsNoPlaceForMore() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    for reader in 1...4 as ClosedRange<UInt64> {
      _ = ledger.answer(request(reader), available: full, now: 0)
    }
    let named = ledger.answer(request(5, limit: 1, wanted: 7..<8), available: full, now: 0)
    #expect(named.granted == [7])
    let more = ledger.answer(request(5, reading: [7]), available: full, now: 0)
    #expect(more.state == .busy)
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

  /// Its answer was lost, or the granted shard could not be read.
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

  private func fill(_ ledger: inout UploadLedger, limit: Int = 2) -> [UInt64: [Int]] {
    var granted: [UInt64: [Int]] = [:]
    for reader in 1...4 as ClosedRange<UInt64> {
      granted[reader] =
        ledger.answer(request(reader, limit: limit), available: full, now: 0)
        .granted
    }
    return granted
  }

  @Test func aPlaceIsATurnWhereOthersWait() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    var granted = fill(&ledger)
    // Nobody waits: readers keep their places.
    let more = request(1, reading: [granted[1]![0]])
    #expect(ledger.answer(more, available: full, now: 3 * second).granted.count == 2)
    #expect(ledger.answer(request(5), available: full, now: 3 * second).state == .serving)
    #expect(ledger.answer(request(6), available: full, now: 3 * second).state == .busy)
    // Somebody waits: no more grants, but it may finish what it is reading.
    let over = request(2, reading: [granted[2]![0]])
    let refused = ledger.answer(over, available: full, now: 3 * second)
    #expect(refused.state == .busy && refused.granted.isEmpty)
    #expect(ledger.outstandingCount(now: 3 * second) > 6)
    for reader in 2...4 as ClosedRange<UInt64> {
      granted[reader] = nil
      _ = ledger.answer(request(reader, limit: 0), available: full, now: 3 * second)
    }
    #expect(ledger.answer(request(6), available: full, now: 3 * second).state == .serving)
  }

  @Test func slowReadersKeepNoFastOnesAway() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    _ = fill(&ledger)
    // One may try; it is fast, so that the slow ones hardly count any more.
    var now = 4 * second
    var trying = ledger.answer(request(10), available: full, now: now).granted
    #expect(trying.count == 2)
    #expect(ledger.answer(request(11), available: full, now: now).state == .busy)
    var have = ShardSet(count: 100)
    for _ in 0..<4 {
      now += second / 20
      have.insert(trying.removeFirst())
      trying +=
        ledger.answer(
          request(10, limit: 1, have: have, reading: trying), available: full, now: now
        ).granted
    }
    for reader in 11...13 as ClosedRange<UInt64> {
      #expect(ledger.answer(request(reader), available: full, now: now).state == .serving)
    }
    #expect(ledger.answer(request(14), available: full, now: now).state == .busy)
  }

  /// Another holder had granted it too, or only a part of the shard was wanted.
  @Test func whatIsGivenBackUnreadSaysNothingOfSpeed() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    _ = fill(&ledger)
    let now = 4 * second
    #expect(ledger.answer(request(10), available: full, now: now).granted.count == 2)
    _ = ledger.answer(request(10, limit: 0), available: full, now: now + second / 1000)
    for reader in 11...13 as ClosedRange<UInt64> {
      #expect(ledger.answer(request(reader), available: full, now: now + second).state == .busy)
    }
  }

  /// Readers of equal speed, one of which at once returns what another holder had granted it too:
  /// the others must not seem slow in comparison.
  @Test func whatIsGivenBackAtOnceMakesNobodySlow() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    var granted = fill(&ledger, limit: 1)
    var have = ShardSet(count: 100)
    for shard in granted.values.joined() { have.insert(shard) }
    let early = second / 1000
    granted[1] =
      ledger.answer(request(1, limit: 1, have: have), available: full, now: early).granted
    for step in 1...3 as ClosedRange<UInt64> {
      for reader in 1...4 as ClosedRange<UInt64> {
        for shard in granted[reader]! { have.insert(shard) }
        let answer = ledger.answer(
          request(reader, limit: 2, have: have, reading: granted[reader]!), available: full,
          now: early + step * second / 2)
        granted[reader]! += answer.granted
      }
    }
    for reader in 10...20 as ClosedRange<UInt64> {
      _ = ledger.answer(request(reader), available: full, now: early + 7 * second / 4)
    }
    let answer = ledger.answer(request(21), available: full, now: early + 7 * second / 4)
    #expect(answer.readerCount <= 5, "four, and one that tries")
  }

  /// A reader that comes again takes no more of a place than before, from the start.
  @Test func whoWasSlowIsKnownForIt() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    var (slow, fast) = (ShardSet(count: 100), ShardSet(count: 100))
    let first = ledger.answer(request(2, limit: 1), available: full, now: 0).granted
    for shard in first { slow.insert(shard) }
    _ = ledger.answer(request(2, limit: 0, reading: first), available: full, now: second)
    let start = 4 * second
    let quick = ledger.answer(request(1, limit: 1), available: full, now: start).granted
    for shard in quick { fast.insert(shard) }
    _ = ledger.answer(
      request(1, limit: 0, reading: quick), available: full, now: start + second / 100)
    _ = ledger.answer(request(1, limit: 0, have: fast), available: full, now: start + second / 50)
    let now = 5 * second
    #expect(
      ledger.answer(request(2, limit: 1, have: slow), available: full, now: now).state == .serving)
    for reader in 11...14 as ClosedRange<UInt64> {
      #expect(ledger.answer(request(reader), available: full, now: now).state == .serving)
    }
    #expect(ledger.answer(request(15), available: full, now: now).state == .busy)
  }

  /// Slow readers take all places and try first; later ones may each try within a round.
  @Test func oneMayTryInEachTurn() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    var granted = fill(&ledger)
    for turn in 1...6 as ClosedRange<UInt64> {
      let now = turn * 3 * second
      for reader in granted.keys.sorted() {
        _ = ledger.answer(
          request(reader, limit: 0, reading: granted[reader]!), available: full, now: now)
      }
      let answer = ledger.answer(request(10 + turn), available: full, now: now)
      #expect(answer.state == .serving, "turn \(turn)")
      granted[10 + turn] = answer.granted
      #expect(ledger.answer(request(30), available: full, now: now).state == .busy)
    }
  }

  @Test func whoWantsNothingKeepsNoPlaceFree() {
    var settings = UploadLedger.Settings()
    settings.turnNanoseconds = 1000 * second
    var ledger = UploadLedger(shardCount: 100, seed: 1, settings: settings)
    let granted = fill(&ledger)
    for step in 0...12 as ClosedRange<UInt64> {
      _ = ledger.answer(request(5, have: full), available: full, now: step * second)
      for (reader, shards) in granted {
        _ = ledger.answer(
          request(reader, limit: 0, reading: shards), available: full, now: step * second)
      }
    }
    _ = ledger.answer(request(1, limit: 0), available: full, now: 12 * second)
    #expect(ledger.answer(request(5, have: full), available: full, now: 12 * second).granted == [])
    #expect(ledger.answer(request(6), available: full, now: 12 * second).state == .serving)
  }

  @Test func equallyFastReadersAreNotMoreThanThePlaces() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    var granted = fill(&ledger)
    var served: Set<UInt64> = [1, 2, 3, 4]
    // Each needs a second per shard; forty others keep asking.
    for step in 1...20 as ClosedRange<UInt64> {
      for reader in granted.keys.sorted() {
        let reading = Array(granted[reader]!.dropFirst())
        let answer = ledger.answer(
          request(reader, limit: 1, reading: reading), available: full, now: step * second)
        granted[reader] = reading + answer.granted
        if granted[reader]!.isEmpty { granted[reader] = nil }
      }
      for reader in 10...50 as ClosedRange<UInt64> where granted[reader] == nil {
        let answer = ledger.answer(request(reader), available: full, now: step * second)
        if answer.granted.isEmpty { continue }
        granted[reader] = answer.granted
        served.insert(reader)
      }
      #expect(granted.count <= 8, "step \(step)")
    }
    #expect(served.count > 16, "places go on to others")
  }

  @Test func whoHasWaitedLongGoesFirst() {
    var ledger = UploadLedger(shardCount: 100, seed: 1)
    var settings = UploadLedger.Settings()
    settings.turnNanoseconds = 1000 * second
    ledger = UploadLedger(shardCount: 100, seed: 1, settings: settings)
    let granted = fill(&ledger)
    for step in 0...12 as ClosedRange<UInt64> {
      _ = ledger.answer(request(5), available: full, now: step * second)
      for (reader, shards) in granted {
        _ = ledger.answer(
          request(reader, limit: 0, reading: shards), available: full, now: step * second)
      }
    }
    _ = ledger.answer(request(1, limit: 0), available: full, now: 12 * second)
    #expect(ledger.answer(request(6), available: full, now: 12 * second).state == .busy)
    #expect(ledger.answer(request(5), available: full, now: 12 * second).state == .serving)
  }
}
