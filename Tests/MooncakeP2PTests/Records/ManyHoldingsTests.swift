import Glibc
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// One process with very many payloads, on a slow service.
@Suite struct ManyHoldingsTests {
  private static let holdingCount = 10_000
  private static let callMilliseconds: UInt32 = 5
  private static let ttlMilliseconds: UInt64 = 4000

  private final class Slowness: Sendable {
    let milliseconds = Atomic<UInt32>(0)
  }

  @Test func noLeaseEndsWhileItsHolderLives() throws {
    let service = ScriptedService()
    let slowness = Slowness()
    let store = ScriptedStore(service) {
      let milliseconds = slowness.milliseconds.load(ordering: .relaxed)
      if milliseconds > 0 { usleep(milliseconds * 1000) }
      return .done
    }
    let directory = StoreDirectory(
      store, prefix: "mooncake/", ttlMilliseconds: Self.ttlMilliseconds)
    let keeper = try RecordKeeper(directory)
    defer { keeper.stop() }
    for index in 0..<Self.holdingCount {
      keeper.put(testRecord("checkpoints/run/\(index)"), testCall)
    }
    // The heads: these names have none yet.
    let keyCount = 2 * Self.holdingCount
    #expect(eventually(within: 60_000) { service.keyCount == keyCount })
    let lost = service.lostLeaseCount
    slowness.milliseconds.store(Self.callMilliseconds, ordering: .relaxed)
    let start = Clock.now()
    let calls = service.callCount
    usleep(UInt32(Self.ttlMilliseconds) * 3000)
    let seconds = Double(Clock.now() - start) / 1e9
    let renewals = service.renewals.filter { $0 >= start }
    let gaps = zip(renewals.dropFirst(), renewals).map { $0 - $1 }
    print(
      "measured \(Self.holdingCount) holdings, \(Self.callMilliseconds) ms a call, lease "
        + "\(Self.ttlMilliseconds) ms: \(renewals.count) renewals in \(seconds) s, longest pause "
        + "\((gaps.max() ?? 0) / 1_000_000) ms, "
        + "\(Int(Double(service.callCount - calls) / seconds)) calls a second")
    #expect(service.lostLeaseCount == lost)
    #expect(service.keyCount == keyCount)
    #expect(renewals.count >= 3)
  }
}
