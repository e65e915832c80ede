import MooncakeP2P
import Testing

/// The plan against hand-written answers.
@Suite struct DownloadPlanTests {
  private let millisecond: UInt64 = 1_000_000
  private let origin = HolderAddress(holding: 1, rpc: "o:1", segment: "origin")

  private func holder(_ number: UInt64) -> HolderAddress {
    HolderAddress(holding: number, rpc: "h:\(number)", segment: "h")
  }

  private func plan(_ shards: Int, settings: DownloadPlan.Settings = .init()) -> DownloadPlan {
    DownloadPlan(
      shardCount: shards, shardBytes: 8 << 20, version: PayloadVersion(high: 1, low: 2),
      own: holder(99), reader: 7, seed: 1, settings: settings)
  }

  private func actions(_ plan: inout DownloadPlan, _ now: UInt64) -> [DownloadPlan.Action] {
    var actions: [DownloadPlan.Action] = []
    while let action = plan.next(now) {
      actions.append(action)
      if actions.count > 1000 { break }
    }
    return actions
  }

  private func asks(_ actions: [DownloadPlan.Action]) -> [(HolderAddress, ShardRequest)] {
    actions.compactMap {
      if case .ask(let holder, let request, _) = $0 { (holder, request) } else { nil }
    }
  }

  private func serving(_ granted: [Int], held: Int = 8) -> ShardAnswer {
    ShardAnswer(
      state: .serving, granted: granted, leaseMilliseconds: 10_000, heldCount: held,
      readerCount: 1)
  }

  /// A plan that has been reading these shards from the only holder, number 2, since time 0.
  private func planReading(_ shards: [Int]) -> DownloadPlan {
    var plan = plan(100)
    plan.add(holder(2), isOrigin: false)
    _ = actions(&plan, 0)
    plan.answered(by: holder(2), serving(shards), now: 0)
    let begun = actions(&plan, 0)
    #expect(shards.allSatisfy { begun.contains(.read(holder(2), shard: $0)) })
    return plan
  }

  @Test func fromAskToCompletion() {
    var plan = plan(3)
    plan.add(origin, isOrigin: true)
    let first = asks(actions(&plan, 0))
    #expect(first.map(\.0) == [origin])
    #expect(first[0].1.have.isEmpty && first[0].1.own == holder(99))
    plan.answered(by: origin, serving([2]), now: 1)
    var next = actions(&plan, 1)
    #expect(next.first == .read(origin, shard: 2))
    // It asks again while the first shard is being read, and not for that one.
    #expect(asks(next).map { $0.1.have.contains(2) } == [true])
    plan.answered(by: origin, serving([0]), now: 2)
    #expect(plan.finished(2, from: origin, isIntact: true, now: 3) == true)
    #expect(plan.finished(2, from: origin, isIntact: true, now: 3) == false)
    next = actions(&plan, 3)
    #expect(next.first == .read(origin, shard: 0))
    #expect(asks(next).map(\.1.reading) == [[0]])
    #expect(asks(next)[0].1.turn > first[0].1.turn)
    plan.answered(by: origin, serving([1]), now: 4)
    #expect(plan.finished(0, from: origin, isIntact: true, now: 5) == true)
    #expect(plan.finished(1, from: origin, isIntact: true, now: 5) == true)
    #expect(plan.isComplete && plan.missingCount == 0)
    #expect(plan.holdersWithGrants == [origin])
    _ = actions(&plan, 6)
    #expect(plan.wakeTime == .max)
  }

  @Test func neighborsAndReadersAreBounded() {
    var plan = plan(1000)
    plan.add(origin, isOrigin: true)
    for number in 2...500 as ClosedRange<UInt64> { plan.add(holder(number), isOrigin: false) }
    plan.add(holder(99), isOrigin: false)
    #expect(plan.holderCount == 16)
    let asked = asks(actions(&plan, 0)).map(\.0)
    #expect(asked.count == 4)
    #expect(Set(asked).count == 4 && !asked.contains(holder(99)))
  }

  @Test func whatIsGrantedTwiceIsReadOnce() {
    var plan = plan(100)
    for number in 2...3 as ClosedRange<UInt64> { plan.add(holder(number), isOrigin: false) }
    _ = actions(&plan, 0)
    plan.answered(by: holder(2), serving([5, 5, 6]), now: 1)
    plan.answered(by: holder(3), serving([5, 100, -1, 4]), now: 1)
    let reads = actions(&plan, 1).filter { if case .read = $0 { true } else { false } }
    #expect(reads == [.read(holder(2), shard: 5)])
  }

  @Test func silenceIsProbedAndTheDeadReplaced() throws {
    var plan = plan(100)
    plan.add(origin, isOrigin: true)
    _ = actions(&plan, 0)
    plan.answered(by: origin, serving([1, 2]), now: 0)
    _ = actions(&plan, 0)
    #expect(actions(&plan, 249 * millisecond) == [])
    #expect(plan.wakeTime == 250 * millisecond)
    let probe = actions(&plan, 250 * millisecond)
    #expect(asks(probe).map(\.1.limit) == [0])
    guard case .ask(_, _, let timeout) = try #require(probe.first) else { return }
    let dead = (250 + timeout) * millisecond
    #expect(dead < 1000 * millisecond)
    plan.askFailed(origin, reason: "no answer", isGone: false, now: dead)
    let canceled = actions(&plan, dead)
    #expect(canceled.contains(.cancel(origin, shard: 1)))
    #expect(canceled.contains(.cancel(origin, shard: 2)))
    #expect(plan.tried.map(\.reason) == ["no answer"])
    // Nothing is requested again before the reads have ended.
    plan.add(holder(2), isOrigin: false)
    #expect(asks(actions(&plan, dead)).first?.1.have.memberCount == 2)
    for shard in 1...2 {
      plan.failed(shard, from: origin, reason: "canceled", isDead: false, now: dead)
    }
    plan.answered(by: holder(2), serving([1]), now: dead)
    #expect(actions(&plan, dead).contains(.read(holder(2), shard: 1)) == true)
  }

  @Test func progressIsNoSilence() {
    var plan = plan(2)
    plan.add(origin, isOrigin: true)
    _ = actions(&plan, 0)
    plan.answered(by: origin, serving([1]), now: 0)
    _ = actions(&plan, 0)
    plan.answered(by: origin, serving([0]), now: 0)
    _ = actions(&plan, 0)
    for step in 1...20 as ClosedRange<UInt64> {
      plan.progressed(origin, bytes: 1000, now: step * 100 * millisecond)
      #expect(asks(actions(&plan, step * 100 * millisecond)).count == 0)
    }
  }

  @Test func theCorruptIsAvoidedForGood() {
    var plan = planReading([1, 2])
    #expect(plan.finished(1, from: holder(2), isIntact: false, now: 1) == false)
    #expect(plan.corruptShardCount == 1)
    #expect(actions(&plan, 1).contains(.cancel(holder(2), shard: 2)) == true)
    plan.failed(2, from: holder(2), reason: "canceled", isDead: false, now: 2)
    plan.discovered(now: 3_600_000 * millisecond)
    plan.add(holder(2), isOrigin: false)
    #expect(plan.holderCount == 0)
    #expect(plan.missingCount == 100)
  }

  @Test func grantsThatNobodyAskedForKeepNobodyBusy() {
    var plan = plan(10)
    plan.add(origin, isOrigin: true)
    var askCount = 0
    var pending = asks(actions(&plan, 0))
    while !pending.isEmpty && askCount < 100 {
      askCount += pending.count
      // Whatever it is asked or told, it grants the same shards at once.
      for (holder, _) in pending { plan.answered(by: holder, serving([1, 2]), now: 1) }
      pending = asks(actions(&plan, 1))
    }
    #expect(askCount < 10)
  }

  @Test func fewShardsAreAskedOfWhomNothingIsKnown() {
    var plan = DownloadPlan(
      shardCount: 400, shardBytes: 1 << 18, version: PayloadVersion(high: 1, low: 2), own: nil,
      reader: 7, seed: 1)
    plan.add(origin, isOrigin: true)
    #expect(asks(actions(&plan, 0)).map(\.1.limit) == [4])
    plan.answered(by: origin, serving([0, 1, 2, 3], held: 400), now: 1)
    #expect(asks(actions(&plan, 1)).isEmpty)
    plan.finished(0, from: origin, isIntact: true, now: 2)
    #expect(asks(actions(&plan, 2)).map(\.1.limit) == [61])
  }

  @Test func aCorruptOriginIsNeverAskedAgain() {
    var plan = plan(10)
    plan.add(origin, isOrigin: true)
    _ = actions(&plan, 0)
    plan.answered(by: origin, serving([1]), now: 0)
    _ = actions(&plan, 0)
    _ = plan.finished(1, from: origin, isIntact: false, now: 1)
    // The request for more was already sent.
    plan.askFailed(origin, reason: "x", isGone: false, now: 2)
    plan.add(origin, isOrigin: true)
    #expect(asks(actions(&plan, 5000 * millisecond)).count == 0)
    plan.discovered(now: 5001 * millisecond)
    #expect(plan.isStuck(16_000 * millisecond))
  }

  /// A question that is never answered delays a download no longer than silence does.
  @Test func aQuestionWithoutAnEndIsNotWaitedFor() {
    var plan = plan(10)
    plan.add(origin, isOrigin: true)
    #expect(asks(actions(&plan, 0)).count == 1)
    var now: UInt64 = 0
    while !plan.isStuck(now), now < 60_000 * millisecond {
      for action in actions(&plan, now) where action == .discover { plan.discovered(now: now) }
      now += 50 * millisecond
    }
    #expect((10_000 * millisecond..<40_000 * millisecond).contains(now))
  }

  @Test func theBusyAreAskedLater() {
    var plan = plan(100)
    plan.add(origin, isOrigin: true)
    _ = actions(&plan, 0)
    plan.answered(
      by: origin, ShardAnswer(state: .busy, retryMilliseconds: 200, heldCount: 100), now: 0)
    #expect(asks(actions(&plan, 140 * millisecond)).count == 0)
    #expect(asks(actions(&plan, 260 * millisecond)).count == 1)
    // A hostile answer delays seconds, not days.
    plan.answered(by: origin, ShardAnswer(state: .busy, retryMilliseconds: .max), now: 0)
    #expect(asks(actions(&plan, 7000 * millisecond)).count == 1)
  }

  @Test func theOriginComesBackTheOthersGo() {
    var plan = plan(100)
    plan.add(origin, isOrigin: true)
    plan.add(holder(2), isOrigin: false)
    _ = actions(&plan, 0)
    plan.answered(by: origin, ShardAnswer(state: .gone), now: 0)
    plan.answered(by: holder(2), ShardAnswer(state: .gone), now: 0)
    #expect(plan.holderCount == 0)
    #expect(plan.tried.count == 2)
    #expect(asks(actions(&plan, 1000 * millisecond)).map(\.0) == [origin])
    #expect(plan.isOrigin(origin) && !plan.isOrigin(holder(2)))
  }

  @Test func stuckOnlyAfterLookingEverywhere() {
    var plan = plan(100)
    plan.add(holder(2), isOrigin: false)
    _ = actions(&plan, 0)
    plan.askFailed(holder(2), reason: "refused", isGone: false, now: 0)
    var looks = 0
    var now: UInt64 = 0
    while !plan.isStuck(now), now < 60_000 * millisecond {
      for action in actions(&plan, now) where action == .discover {
        looks += 1
        plan.discovered(now: now)
      }
      now += 50 * millisecond
    }
    #expect(looks >= 2)
    // Not before a returning network has had its time, but soon after.
    #expect(now > 10_000 * millisecond && now < 11_000 * millisecond)
  }

  @Test func looksIntoTheMetadataAreBounded() {
    var plan = plan(100)
    plan.add(origin, isOrigin: true)
    var looks = 0
    for step in 0..<2000 as Range<UInt64> {
      let now = step * 20 * millisecond
      for action in actions(&plan, now) {
        if action == .discover {
          looks += 1
          plan.discovered(now: now)
        } else if case .ask(let holder, _, _) = action {
          plan.answered(
            by: holder, ShardAnswer(state: .busy, retryMilliseconds: 50, heldCount: 9), now: now)
        }
      }
    }
    #expect(looks == 4)
  }

  @Test func theLastShardMovesToWhoIsFaster() {
    var plan = planWithLastShardAtHolder3()
    // A trickle: 16 KiB each 100 ms.
    var now = 100 * millisecond
    var moving: ShardRequest?
    for _ in 0..<20 where moving == nil {
      now += 100 * millisecond
      plan.progressed(holder(3), bytes: 16 << 10, now: now)
      for (holder, request) in asks(actions(&plan, now)) {
        if holder == self.holder(2) && request.wanted == 1..<2 {
          moving = request
        } else {
          plan.answered(by: holder, serving([]), now: now)
        }
      }
    }
    #expect(moving?.have.contains(1) == false)
    // The first read is canceled only once the other holder has granted.
    plan.answered(by: holder(2), serving([1]), now: now)
    let canceled = actions(&plan, now)
    #expect(canceled.contains(.cancel(holder(3), shard: 1)))
    #expect(!canceled.contains(.read(holder(2), shard: 1)))
    plan.failed(1, from: holder(3), reason: "canceled", isDead: false, now: now)
    #expect(actions(&plan, now).contains(.read(holder(2), shard: 1)))
  }

  /// Of two shards, holder 2 has sent one in a tenth of a second; the other is read from holder 3.
  private func planWithLastShardAtHolder3() -> DownloadPlan {
    var plan = plan(2)
    plan.add(holder(2), isOrigin: false)
    plan.add(holder(3), isOrigin: false)
    var grants: [HolderAddress: [Int]] = [holder(2): [0], holder(3): [1]]
    for _ in 0..<4 {
      for (holder, _) in asks(actions(&plan, 0)) {
        plan.answered(by: holder, serving(grants.removeValue(forKey: holder) ?? []), now: 0)
      }
    }
    plan.finished(0, from: holder(2), isIntact: true, now: 100 * millisecond)
    return plan
  }

  /// A shard that is a single slice counts no bytes until all of it has arrived.
  @Test func theLastShardLeavesWhoOnlyTrickles() {
    var plan = planWithLastShardAtHolder3()
    var isMoved = false
    for turn in 2...20 as ClosedRange<UInt64> {
      let now = turn * 100 * millisecond
      plan.progressed(holder(3), bytes: 0, now: now)
      for (holder, request) in asks(actions(&plan, now)) {
        isMoved = isMoved || holder == self.holder(2) && request.wanted == 1..<2
        plan.answered(by: holder, serving([]), now: now)
      }
    }
    #expect(isMoved)
  }

  @Test func aRangeOnly() {
    var have = ShardSet(count: 10, isFull: true)
    for shard in 3...4 { have.remove(shard) }
    var plan = DownloadPlan(
      shardCount: 10, shardBytes: 1 << 20, version: PayloadVersion(high: 1, low: 2), own: nil,
      reader: 7, seed: 1, have: have)
    plan.add(origin, isOrigin: true)
    #expect(plan.missingCount == 2)
    _ = actions(&plan, 0)
    plan.answered(by: origin, serving([3]), now: 0)
    _ = actions(&plan, 0)
    plan.answered(by: origin, serving([4]), now: 0)
    _ = actions(&plan, 0)
    plan.finished(3, from: origin, isIntact: true, now: 1)
    plan.finished(4, from: origin, isIntact: true, now: 1)
    #expect(plan.isComplete)
  }

  @Test func reportsOfStrangersAreIgnored() {
    var plan = plan(10)
    plan.add(origin, isOrigin: true)
    plan.answered(by: holder(5), serving([1]), now: 0)
    plan.answered(by: origin, serving([1]), now: 0)
    plan.askFailed(holder(5), reason: "x", isGone: true, now: 0)
    plan.failed(-3, from: origin, reason: "x", isDead: true, now: 0)
    plan.progressed(holder(5), bytes: .max, now: 0)
    #expect(plan.finished(1, from: origin, isIntact: true, now: 0) == false)
    #expect(plan.missingCount == 10)
    #expect(actions(&plan, 0).count == 1)
  }

  /// Runs an origin that answers each question as `answer` says and sends nothing, until the plan
  /// is stuck; returns that time.
  private func silence(
    _ plan: inout DownloadPlan, holders: [HolderAddress], within milliseconds: UInt64,
    _ answer: (HolderAddress, ShardRequest) -> ShardAnswer
  ) -> UInt64? {
    for step in 0..<(milliseconds / 10) {
      let now = step * 10 * millisecond
      for action in actions(&plan, now) {
        switch action {
        case .ask(let holder, let request, _):
          plan.answered(by: holder, answer(holder, request), now: now)
        case .cancel(let holder, let shard):
          plan.failed(shard, from: holder, reason: "canceled", isDead: false, now: now)
        case .discover: plan.discovered(now: now)
        case .read, .leave: break
        }
      }
      if plan.isStuck(now) { return now }
    }
    return nil
  }

  @Test(arguments: [true, false])
  func whoAnswersAndGrantsButSendsNothingIsGivenUp(isOrigin: Bool) throws {
    var plan = plan(100)
    plan.add(origin, isOrigin: isOrigin)
    var next = 0
    let end = try #require(
      silence(&plan, holders: [origin], within: 60_000) { _, request in
        if request.limit == 0 { return serving([]) }
        next += 1
        return serving([next % 100])
      })
    #expect(end < 16_000 * millisecond, "grants are no bytes")
    if isOrigin { #expect(plan.tried.contains { $0.reason.contains("sends nothing") }) }
  }

  @Test func whoAlwaysPutsOffIsGivenUp() throws {
    var plan = plan(100)
    plan.add(origin, isOrigin: true)
    let end = try #require(
      silence(&plan, holders: [origin], within: 200_000) { _, _ in
        ShardAnswer(state: .busy, retryMilliseconds: 500, heldCount: 100)
      })
    #expect(end > 100_000 * millisecond && end < 130_000 * millisecond)
  }

  @Test func manyThatSendNothingAreGivenUpAtOnce() {
    var plan = plan(1000)
    for number in 2...40 as ClosedRange<UInt64> { plan.add(holder(number), isOrigin: false) }
    plan.add(origin, isOrigin: true)
    for action in actions(&plan, 0) {
      guard case .ask(let holder, _, _) = action else { continue }
      plan.answered(by: holder, serving([Int(holder.holding)]), now: 0)
    }
    // Nothing was looked at in between, as if the process had been stopped.
    #expect(actions(&plan, 3_600_000 * millisecond).count < 100)
  }

  @Test func aLostQuestionEndsNoReadThatFlows() {
    var plan = plan(100)
    plan.add(holder(2), isOrigin: false)
    _ = actions(&plan, 0)
    plan.answered(by: holder(2), serving([1]), now: 0)
    #expect(asks(actions(&plan, 0)).count == 1)
    plan.progressed(holder(2), bytes: 1000, now: 300 * millisecond)
    plan.askFailed(holder(2), reason: "no answer", isGone: false, now: 400 * millisecond)
    #expect(asks(actions(&plan, 400 * millisecond)).isEmpty)
    #expect(plan.holderCount == 1)
    // Without bytes it is different.
    #expect(asks(actions(&plan, 600 * millisecond)).count == 1)
    plan.askFailed(holder(2), reason: "no answer", isGone: false, now: 1000 * millisecond)
    #expect(actions(&plan, 1000 * millisecond).contains(.cancel(holder(2), shard: 1)))
  }

  @Test func theDroppedIsToldOnceItsReadsHaveEnded() {
    var plan = planReading([1, 2])
    plan.failed(1, from: holder(2), reason: "reset", isDead: true, now: 1)
    func left(_ actions: [DownloadPlan.Action]) -> Int {
      actions.count { if case .leave(holder(2), _) = $0 { true } else { false } }
    }
    #expect(left(actions(&plan, 1)) == 0)
    #expect(plan.holdersWithGrants.contains(holder(2)))
    plan.failed(2, from: holder(2), reason: "canceled", isDead: false, now: 2)
    #expect(left(actions(&plan, 2)) == 1)
    #expect(plan.holdersWithGrants.isEmpty)
  }

  /// The origin has died; the other holder has nothing that is missing here.
  @Test func withoutAnybodyWhoMayHelpItIsForsaken() {
    let late = 500 * millisecond
    func lacksSource(_ other: ShardAnswer?, at now: UInt64) -> Bool {
      var plan = plan(100)
      plan.add(origin, isOrigin: true)
      plan.add(holder(2), isOrigin: false)
      #expect(asks(actions(&plan, 0)).count == 2)
      plan.askFailed(origin, reason: "refused", isGone: false, now: 1)
      if let other { plan.answered(by: holder(2), other, now: 1) }
      return plan.lacksSource(now)
    }
    #expect(lacksSource(serving([], held: 99), at: late))
    #expect(lacksSource(ShardAnswer(state: .gone), at: late))
    #expect(lacksSource(nil, at: late))
    // Not at once; not while the other one may send something.
    #expect(!lacksSource(serving([], held: 99), at: late - 1))
    #expect(!lacksSource(serving([], held: 100), at: late))
    #expect(!lacksSource(ShardAnswer(state: .busy, heldCount: 1), at: late))
    #expect(!lacksSource(serving([5], held: 99), at: late))
  }

  @Test func whoWasNotAskedYetMayHelp() {
    var plan = plan(100)
    plan.add(origin, isOrigin: true)
    _ = actions(&plan, 0)
    plan.askFailed(origin, reason: "refused", isGone: false, now: 1)
    #expect(plan.lacksSource(600 * millisecond))
    plan.add(holder(2), isOrigin: false)
    #expect(!plan.lacksSource(600 * millisecond))
    #expect(asks(actions(&plan, 600 * millisecond)).contains { $0.0 == holder(2) })
    #expect(!plan.lacksSource(1099 * millisecond))
    #expect(plan.lacksSource(1100 * millisecond))
  }

  @Test func whoDoesNotAnswerKeepsNobodyFromBeingAsked() {
    var plan = plan(100)
    for number in 2...16 as ClosedRange<UInt64> { plan.add(holder(number), isOrigin: false) }
    plan.add(origin, isOrigin: true)
    var asked: Set<HolderAddress> = []
    for step in 0...30 as ClosedRange<UInt64> {
      asked.formUnion(asks(actions(&plan, step * 10 * millisecond)).map(\.0))
    }
    #expect(asked.count == 16)
  }
}
