import Glibc
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Gets of a version that loses its holders when the name already has another one.
@Suite struct FollowTests {
  private static let size = 32 << 20

  /// Synchronizes two gets and the test.
  private final class Meeting: Sendable {
    private let arrivals = Atomic(0)
    private let isOver = Atomic(false)
    private let end = Lock<UInt64>(0)

    var arrivalCount: Int { arrivals.load(ordering: .acquiring) }
    func release() {
      end.withLock { $0 = Clock.now() }
      isOver.store(true, ordering: .releasing)
    }
    /// Milliseconds since `release`.
    var elapsed: UInt64 { (Clock.now() - end.withLock { $0 }) / 1_000_000 }

    /// Slows a get so that it cannot finish, and holds it once it has a part.
    func operation() -> StoreOperation {
      var operation = StoreOperation()
      operation.timeoutMilliseconds = 30_000
      let hasArrived = Once()
      operation.progress = { [self] progress in
        let deadline = Deadline.after(milliseconds: 120)
        while !isOver.load(ordering: .acquiring) && !deadline.hasPassed { usleep(1000) }
        guard progress.doneBytes > 0, hasArrived.claim() else { return true }
        arrivals.wrappingAdd(1, ordering: .acquiringAndReleasing)
        _ = eventually(within: 20_000) { isOver.load(ordering: .acquiring) }
        return true
      }
      return operation
    }
  }

  private final class Once: Sendable {
    private let isClaimed = Atomic(false)
    func claim() -> Bool { !isClaimed.exchange(true, ordering: .acquiringAndReleasing) }
  }

  /// Both receivers live and have a part, but nobody has the rest.
  @Test func whoHasLostTheOnlyHolderGoesOnToTheNextVersion() throws {
    let cluster = try Cluster()
    let (first, second) = (try cluster.store(), try cluster.store())
    let receivers = [try cluster.store(), try cluster.store()]
    let (old, new) = (Memory(Self.size, seed: 1), Memory(Self.size, seed: 2))
    var shards = RegisterOptions()
    shards.shardBytes = 256 << 10
    try first.register("m", [old.buffer], shards)
    let meeting = Meeting()
    let times = Lock<[UInt64]>([])
    let threads = try receivers.map { receiver in
      try WorkerThread.start(name: "get") {
        let memory = Memory(Self.size)
        var options = GetOptions()
        options.followsVersions = true
        do {
          _ = try receiver.get("m", into: [memory.buffer], options, meeting.operation())
          times.withLock { $0.append(meeting.elapsed) }
          #expect(memory.holds(new))
        } catch {
          Issue.record("\(error)")
        }
        try? receiver.deleteReplica("m")
      }
    }
    #expect(eventually(within: 20_000) { meeting.arrivalCount == 2 })
    try second.register("m", [new.buffer], shards)
    first.engine.close()
    meeting.release()
    for thread in threads { thread.join() }
    let slowest = times.withLock { $0.max() } ?? .max
    #expect(slowest < 5000, "\(slowest) ms")
    withExtendedLifetime((old, new)) {}
  }
}
