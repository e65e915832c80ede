import MooncakeMetadata
import Testing

/// A keeper, its owner's rounds and a service, on a made-up clock in milliseconds.
private struct Scene {
  static let ttlMilliseconds: UInt64 = 3000

  var keeper: LeaseKeeper
  var now: UInt64 = 5_000_000
  /// How long each call takes; the service handles it at the end.
  var callMilliseconds: UInt64 = 0
  /// The most that the service grants.
  var grantLimit = UInt64.max
  var isReachable = true
  /// Of the service: the leases granted so far, and when the last one ends.
  var grantCount: UInt64 = 0
  var end: UInt64 = 0
  /// Leases that have ended while the owner lived.
  var lossCount = 0
  var renewals: [UInt64] = []

  init() {
    keeper = LeaseKeeper(ttlMilliseconds: Self.ttlMilliseconds, at: now * 1_000_000)
  }

  var nanoseconds: UInt64 { now * 1_000_000 }
  var ttl: UInt64 { min(Self.ttlMilliseconds, grantLimit) }

  /// One round of an owner: renews the lease, or is granted one.
  mutating func round() {
    let asked = nanoseconds
    now += callMilliseconds
    guard isReachable else {
      _ = keeper.failed(at: nanoseconds)
      return
    }
    if let lease = keeper.lease {
      if now >= end {
        lossCount += 1
        keeper.forget(lease)
        _ = keeper.succeeded(at: nanoseconds, isFinished: false)
        return
      }
      renewals.append(now)
      keeper.renewed(lease, at: asked)
    } else {
      grantCount += 1
      keeper.granted(MetadataLease(id: grantCount, ttlMilliseconds: ttl), at: asked)
    }
    end = now + ttl
    _ = keeper.succeeded(at: nanoseconds)
  }

  /// Runs rounds when they are due.
  mutating func run(milliseconds: UInt64) {
    let stop = now + milliseconds
    while keeper.next < stop * 1_000_000 {
      now = max(now, (keeper.next + 999_999) / 1_000_000)
      round()
    }
    now = max(now, stop)
  }
}

struct LeaseKeeperTests {
  private let lease = MetadataLease(id: 1, ttlMilliseconds: 3000)
  private let other = MetadataLease(id: 2, ttlMilliseconds: 3000)

  @Test func renewsAfterAThird() {
    var scene = Scene()
    let start = scene.now
    scene.round()
    scene.run(milliseconds: 10_500)
    #expect(scene.renewals == (1...10).map { start + $0 * 1000 })
    #expect(scene.grantCount == 1 && scene.lossCount == 0)
  }

  /// What comes between does not move the next renewal.
  @Test func otherRoundsDoNotDelayARenewal() {
    var scene = Scene()
    scene.round()
    let granted = scene.nanoseconds
    for _ in 0..<9 {
      scene.now += 100
      #expect(!scene.keeper.isDue(at: scene.nanoseconds))
      _ = scene.keeper.succeeded(at: scene.nanoseconds)
      #expect(scene.keeper.next == granted + 1_000_000_000)
    }
    scene.now += 100
    #expect(scene.keeper.isDue(at: scene.nanoseconds))
    // Never without a pause.
    _ = scene.keeper.succeeded(at: scene.nanoseconds)
    #expect(scene.keeper.next == scene.nanoseconds + 100_000_000)
  }

  /// A late answer does not count from when it came.
  @Test(arguments: [0, 1, 500, 900, 999, 1000, 1400] as [UInt64])
  func slowCallsLoseNothing(_ callMilliseconds: UInt64) {
    var scene = Scene()
    scene.callMilliseconds = callMilliseconds
    scene.round()
    scene.run(milliseconds: 100_000)
    #expect(scene.lossCount == 0)
    let gaps = zip(scene.renewals.dropFirst(), scene.renewals).map { $0 - $1 }
    #expect(gaps.max()! <= max(1000, callMilliseconds + 100))
  }

  @Test func oneRenewalMayFail() {
    var scene = Scene()
    scene.round()
    for _ in 0..<20 {
      // Up to just before the next round, which then fails after all its time.
      scene.run(milliseconds: scene.keeper.next / 1_000_000 - 1 - scene.now)
      scene.isReachable = false
      scene.callMilliseconds = scene.keeper.callMilliseconds
      scene.run(milliseconds: 2)
      scene.isReachable = true
      scene.callMilliseconds = 0
      scene.run(milliseconds: 200)
    }
    #expect(scene.lossCount == 0 && scene.grantCount == 1)
  }

  @Test func aLostLeaseIsReplacedSoon() {
    var scene = Scene()
    scene.round()
    scene.isReachable = false
    scene.run(milliseconds: 4000)
    scene.isReachable = true
    let back = scene.now
    scene.run(milliseconds: 1200)
    #expect(scene.lossCount == 1 && scene.grantCount == 2)
    #expect(scene.keeper.lease?.id == 2)
    // At most the longest pause until the loss is noticed, and the shortest until the new lease.
    #expect(scene.end - Scene.ttlMilliseconds <= back + 1100)
  }

  @Test func answersAboutAFormerLease() {
    var keeper = LeaseKeeper(ttlMilliseconds: 3000, at: 0)
    let first = keeper.granted(lease, at: 0)
    // The first of two that were granted at once is used.
    let second = keeper.granted(other, at: 10)
    #expect(first == lease && second == lease && keeper.lease == lease)
    let isForgotten = keeper.forget(lease)
    #expect(isForgotten && keeper.lease == nil)
    keeper.granted(other, at: 500_000_000)
    // The renewal, and the loss, of the former one.
    keeper.renewed(lease, at: 900_000_000)
    let isForgottenAgain = keeper.forget(lease)
    #expect(!isForgottenAgain && keeper.lease == other)
    #expect(keeper.isDue(at: 1_500_000_000) && !keeper.isDue(at: 1_499_999_999))
    // An answer overtaken by a later one.
    keeper.renewed(other, at: 1_400_000_000)
    keeper.renewed(other, at: 1_300_000_000)
    #expect(!keeper.isDue(at: 2_399_999_999))
  }

  @Test func pausesDouble() {
    var scene = Scene()
    scene.round()
    #expect(!scene.keeper.isDown && scene.keeper.endMilliseconds == 2000)
    var pauses: [UInt64] = []
    var news: [Bool] = []
    for _ in 0..<7 {
      news.append(scene.keeper.failed(at: scene.nanoseconds))
      pauses.append((scene.keeper.next - scene.nanoseconds) / 1_000_000)
    }
    #expect(pauses == [100, 200, 400, 800, 1000, 1000, 1000])
    #expect(news == [true] + Array(repeating: false, count: 6))
    #expect(scene.keeper.isDown && scene.keeper.endMilliseconds == 500)
    // The lease is kept through all of it.
    #expect(scene.keeper.lease?.id == 1)
  }

  @Test func successResetsThePauses() {
    var keeper = LeaseKeeper(ttlMilliseconds: 3000, at: 0)
    for _ in 0..<5 { _ = keeper.failed(at: 0) }
    let first = keeper.succeeded(at: 0)
    let second = keeper.succeeded(at: 0)
    #expect(first && !second && !keeper.isDown)
    let isNews = keeper.failed(at: 0)
    #expect(isNews && keeper.next == 100_000_000)
  }

  /// Refused changes are put again with the renewal, but a lease that is due does not wait.
  @Test func refusedChangesWaitForTheRenewal() {
    var keeper = LeaseKeeper(ttlMilliseconds: 3000, at: 0)
    keeper.granted(lease, at: 0)
    _ = keeper.failed(at: 300_000_000, isRefused: true)
    #expect(keeper.next == 1_000_000_000)
    _ = keeper.failed(at: 1_100_000_000, isRefused: true)
    #expect(keeper.next == 1_300_000_000)
  }

  @Test(arguments: [2999, 1000, 500, 150, 100] as [UInt64])
  func aServiceThatGrantsLess(_ limit: UInt64) {
    var scene = Scene()
    scene.grantLimit = limit
    scene.round()
    let start = scene.now
    scene.run(milliseconds: 10 * limit)
    #expect(scene.lossCount == 0)
    #expect(scene.renewals.first! <= start + limit / 3 + 1)
    #expect(scene.keeper.callMilliseconds == 1000)
  }

  @Test func aServiceThatGrantsMore() {
    var keeper = LeaseKeeper(ttlMilliseconds: 3000, at: 0)
    keeper.granted(MetadataLease(id: 1, ttlMilliseconds: 60_000), at: 0)
    #expect(keeper.isDue(at: 1_000_000_000))
  }

  /// Less than a period, so that one round that fails after all its time costs no lease.
  @Test func callsMayTakeNearlyAPeriod() {
    for ttl in [2000, 10_000, 3_600_000] as [UInt64] {
      let keeper = LeaseKeeper(ttlMilliseconds: ttl, at: 0)
      #expect(keeper.callMilliseconds == max(1000, ttl * 3 / 10))
    }
  }

  /// A service without leases: there is nothing to keep, but the entries are checked.
  @Test func withoutLeases() {
    var keeper = LeaseKeeper(ttlMilliseconds: 3000, at: 0)
    let lease = keeper.granted(nil, at: 500_000_000)
    #expect(lease == nil)
    _ = keeper.succeeded(at: 500_000_000)
    #expect(keeper.next == 1_500_000_000)
    keeper.renewed(nil, at: 1_500_000_000)
    _ = keeper.succeeded(at: 1_500_000_000)
    #expect(keeper.next == 2_500_000_000)
  }

  @Test func roundsThatBeginLater() {
    var keeper = LeaseKeeper(ttlMilliseconds: 3000, at: 0)
    #expect(keeper.next == 1_000_000_000)
    keeper.begin(at: 7_000_000_000)
    #expect(keeper.next == 8_000_000_000)
  }
}
