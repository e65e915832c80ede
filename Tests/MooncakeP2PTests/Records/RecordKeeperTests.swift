import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// The records of one process, stopped at the end of the test.
private final class Process: Sendable {
  let directory: StoreDirectory
  let keeper: RecordKeeper

  init(_ service: ServiceProcess) throws {
    directory = try service.directory()
    keeper = try RecordKeeper(directory)
  }

  deinit { keeper.stop() }
}

/// In these tests, renewals come every two thirds of a second.
@Suite struct RecordKeeperTests {
  private func keys(_ service: ServiceProcess) throws -> [String] {
    try service.store().listAll(prefix: "", testCall).entries.map(\.key)
  }

  @Test(arguments: ServiceProcess.Kind.installed)
  func publishesAndTakesBack(_ kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let one = try Process(service)
    let record = testRecord("a/b")
    try one.keeper.publish(record, isCreateOnly: false, testCall)
    let head = try #require(try one.directory.head("a/b", testCall))
    #expect(head.origin == record.holder && head.version == record.version)
    // Well beyond the time to live, everything is still there.
    usleep(5_000_000)
    #expect(try keys(service).count == 2)
    var part = testRecord("other", isOrigin: false, isComplete: false)
    one.keeper.put(part, testCall)
    part.isComplete = true
    one.keeper.put(part, testCall)
    #expect(try one.directory.allHolders(of: "other", testCall) == [part])
    one.keeper.remove(record, testCall)
    #expect(try one.directory.head("a/b", testCall) == nil)
    #expect(try one.directory.allHolders(of: "a/b", testCall).isEmpty)
    one.keeper.stop()
    #expect(try keys(service).isEmpty)
    // Afterwards nothing is put.
    one.keeper.put(part, testCall)
    #expect(code { try one.keeper.publish(record, isCreateOnly: true, testCall) } == .invalidHandle)
    #expect(try keys(service).isEmpty)
  }

  @Test(arguments: ServiceProcess.Kind.installed)
  func whatALostServiceHeldIsPutAgain(_ kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let one = try Process(service)
    let record = testRecord("a")
    try one.keeper.publish(record, isCreateOnly: false, testCall)
    // Somebody deletes the keys one by one.
    for key in try keys(service) { _ = try service.store().delete(key, testCall) }
    #expect(eventually { (try? keys(service).count) == 2 })
    // While nothing can be put, a call that reports it keeps its deadline.
    service.kill()
    let start = Clock.now()
    one.keeper.put(
      testRecord("b", isOrigin: false, isComplete: false),
      Call(until: .after(milliseconds: 500)))
    #expect(Clock.now() - start < 1_500_000_000)
    usleep(2_500_000)
    try service.restartEmpty()
    #expect(eventually { (try? keys(service).count) == 3 })
    #expect(try one.directory.head("a", testCall)?.origin == record.holder)
    let restarted = Clock.now()
    one.keeper.stop()
    #expect(Clock.now() - restarted < 3_000_000_000)
    #expect(try keys(service).isEmpty)
  }

  @Test(arguments: ServiceProcess.Kind.installed.filter { $0 != .ours })
  func aLostLeaseIsMadeAnew(_ kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let one = try Process(service)
    let record = testRecord("a")
    try one.keeper.publish(record, isCreateOnly: false, testCall)
    let stranger = try service.store()
    try stranger.put(MetadataEntry(key: "stranger", value: "v"), lease: nil, testCall)
    // The service is frozen through all renewals.
    service.freeze()
    usleep(4_500_000)
    service.thaw()
    #expect(
      eventually {
        (try? one.directory.head("a", testCall))?.origin == record.holder
          && (try? one.directory.allHolders(of: "a", testCall)) == [record]
      })
    usleep(3_000_000)
    #expect(try keys(service).count == 3)
    one.keeper.stop()
    #expect(try keys(service) == ["stranger"])
  }

  @Test(arguments: ServiceProcess.Kind.installed)
  func oneOfManyCreatesAName(_ kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let processes = try (0..<8).map { _ in try Process(service) }
    let winners = Atomic(0)
    let losers = Atomic(0)
    let threads = try processes.enumerated().map { index, process in
      try WorkerThread.start(name: "create") {
        do throws(MooncakeError) {
          try process.keeper.publish(
            testRecord("one", version: UInt64(index)), isCreateOnly: true, testCall)
          winners.wrappingAdd(1, ordering: .relaxed)
        } catch {
          if error.code == .exists { losers.wrappingAdd(1, ordering: .relaxed) }
        }
      }
    }
    for thread in threads { thread.join() }
    let (winnerCount, loserCount) = (
      winners.load(ordering: .relaxed), losers.load(ordering: .relaxed)
    )
    #expect(winnerCount == 1 && loserCount == 7)
    #expect(try processes[0].directory.allHolders(of: "one", testCall).count == 1)
    // Without create-only, the last publisher gets the name, and the others accept that.
    let last = testRecord("one", version: 99)
    try processes[0].keeper.publish(last, isCreateOnly: false, testCall)
    usleep(2_000_000)
    #expect(try processes[0].directory.head("one", testCall)?.version == last.version)
  }

  @Test(arguments: ServiceProcess.Kind.installed)
  func anotherHolderTakesTheName(_ kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let (origin, replica, part, old) = (
      try Process(service), try Process(service), try Process(service), try Process(service)
    )
    let former = testRecord("a", version: 1)
    try old.keeper.publish(former, isCreateOnly: false, testCall)
    try origin.keeper.publish(testRecord("a", version: 2), isCreateOnly: false, testCall)
    let copy = testRecord("a", version: 2, isOrigin: false)
    replica.keeper.put(copy, testCall)
    part.keeper.put(testRecord("a", version: 2, isOrigin: false, isComplete: false), testCall)
    usleep(1_500_000)
    #expect(try replica.directory.head("a", testCall)?.version == copy.version)
    origin.keeper.stop()
    // Neither an incomplete holder nor one of an older version.
    #expect(eventually { (try? replica.directory.head("a", testCall))?.origin == copy.holder })
    #expect(try replica.directory.head("a", testCall)?.version == copy.version)
    replica.keeper.remove(copy, testCall)
    usleep(1_500_000)
    #expect(try replica.directory.head("a", testCall) == nil)
    #expect(try replica.directory.allHolders(of: "a", testCall).count == 2)
  }

  @Test(arguments: ServiceProcess.Kind.installed)
  func removalReachesEveryHolder(_ kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let processes = try (0..<3).map { _ in try Process(service) }
    let records = (0..<3).map { testRecord("a", isOrigin: $0 == 0, isComplete: $0 < 2) }
    let other = testRecord("b")
    try processes[0].keeper.publish(records[0], isCreateOnly: false, testCall)
    try processes[0].keeper.publish(other, isCreateOnly: false, testCall)
    let calls = Atomic(0)
    for (process, record) in zip(processes, records) {
      process.keeper.onRemoval { removed in
        if removed.name == "a" { calls.wrappingAdd(1, ordering: .relaxed) }
        process.keeper.remove(record, testCall)
      }
      if !record.isOrigin { process.keeper.put(record, testCall) }
    }
    #expect(try processes[1].directory.remove("a", testCall))
    // A list omits it at once; the records go soon.
    #expect(try processes[0].directory.list(prefix: "", testCall).count == 1)
    #expect(try !processes[0].directory.remove("a", testCall))
    #expect(
      eventually { (try? processes[0].directory.allHolders(of: "a", testCall).isEmpty) == true })
    #expect(calls.load(ordering: .relaxed) >= 3)
    // The name is free at once, even for the same version, which then stays.
    let again = testRecord("a")
    try processes[2].keeper.publish(again, isCreateOnly: true, testCall)
    usleep(1_500_000)
    #expect(try processes[0].directory.head("a", testCall)?.origin == again.holder)
    // The handlers keep their processes alive.
    for process in processes {
      process.keeper.stop()
      process.keeper.onRemoval { _ in }
    }
  }

  @Test func aRecordThatComesAndGoesLeavesNothing() throws {
    let service = try ServiceProcess(.ours)
    let one = try Process(service)
    let threads = try (0..<6).map { index in
      try WorkerThread.start(name: "flicker") {
        for round in 0..<40 {
          let record = testRecord("a", holding: UInt64(round % 3 + 1))
          if index % 2 == 0 {
            one.keeper.put(record, testCall)
          } else {
            one.keeper.remove(record, testCall)
          }
        }
      }
    }
    for thread in threads { thread.join() }
    for holding in 1...3 { one.keeper.remove(testRecord("a", holding: UInt64(holding)), testCall) }
    #expect(try one.directory.allHolders(of: "a", testCall).isEmpty)
    usleep(1_500_000)
    #expect(try keys(service).isEmpty)
  }
}
