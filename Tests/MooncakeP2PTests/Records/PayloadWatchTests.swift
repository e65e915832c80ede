import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// What a watch has reported, and when.
private final class Told: Sendable {
  private let changes = Lock<[(change: PayloadChange, time: UInt64)]>([])

  func add(_ change: PayloadChange) {
    let now = Clock.now()
    changes.withLock { $0.append((change, now)) }
  }

  /// "+name@version" appeared, "=" changed, "-name" vanished.
  var texts: [String] {
    changes.withLock { changes in
      changes.map {
        switch $0.change {
        case .appeared(let info): "+\(info.name)@\(info.version?.low ?? 0)"
        case .changed(let info): "=\(info.name)@\(info.version?.low ?? 0)"
        case .vanished(let name): "-\(name)"
        }
      }
    }
  }

  var lastTime: UInt64 { changes.withLock { $0.last?.time ?? 0 } }
}

@Suite struct PayloadWatchTests {
  @Test(arguments: ServiceProcess.Kind.installed)
  func tellsWhatHappens(_ kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let directory = try service.directory()
    let (one, two) = (try RecordKeeper(directory), try RecordKeeper(directory))
    defer {
      one.stop()
      two.stop()
    }
    let first = testRecord("w/a", version: 1)
    try one.publish(first, isCreateOnly: false, testCall)
    try one.publish(testRecord("other", version: 1), isCreateOnly: false, testCall)
    let told = Told()
    let watch = try PayloadWatch(directory, prefix: "w/") { told.add($0) }
    #expect(eventually { told.texts == ["+w/a@1"] })
    // The watch's limit is a tenth of a second; Redis is listed twice a second.
    let start = Clock.now()
    let second = testRecord("w/a", version: 2)
    try one.publish(second, isCreateOnly: false, testCall)
    one.remove(first, testCall)
    #expect(eventually { told.texts == ["+w/a@1", "=w/a@2"] })
    let milliseconds = (told.lastTime &- start) / 1_000_000
    #expect(milliseconds < (kind == .redis ? 1500 : 1000))
    // Another holder taking over the name is not a change.
    let copy = testRecord("w/a", version: 2, isOrigin: false)
    two.put(copy, testCall)
    one.remove(second, testCall)
    #expect(eventually { (try? directory.head("w/a", testCall))?.origin == copy.holder })
    usleep(1_200_000)
    #expect(told.texts == ["+w/a@1", "=w/a@2"])
    two.remove(copy, testCall)
    #expect(eventually { told.texts == ["+w/a@1", "=w/a@2", "-w/a"] })
    // A removal is reported at once, though the holder learns of it later.
    try two.publish(testRecord("w/b", version: 3), isCreateOnly: false, testCall)
    #expect(eventually { told.texts.last == "+w/b@3" })
    #expect(try directory.remove("w/b", testCall))
    #expect(eventually(within: 2000) { told.texts.last == "-w/b" })
    watch.stop()
    try two.publish(testRecord("w/c"), isCreateOnly: false, testCall)
    usleep(300_000)
    #expect(told.texts.count == 5)
  }

  @Test(.enabled(if: ServiceProcess.Kind.etcd.isInstalled, "etcd is not installed"))
  func etcdTellsWithinATenthOfASecond() throws {
    let service = try ServiceProcess(.etcd)
    let directory = try service.directory()
    let keeper = try RecordKeeper(directory)
    defer { keeper.stop() }
    let told = Told()
    let watch = try PayloadWatch(directory, prefix: "") { told.add($0) }
    usleep(300_000)
    var delays: [UInt64] = []
    var former: HolderRecord?
    for round in 1...40 {
      let record = testRecord("a", version: UInt64(round))
      try keeper.publish(record, isCreateOnly: false, testCall)
      let published = Clock.now()
      let isTold = eventually(within: 3000) { told.texts.count == round }
      #expect(isTold)
      delays.append(told.lastTime > published ? (told.lastTime - published) / 1000 : 0)
      // The name already has the next version.
      if let former { keeper.remove(former, testCall) }
      former = record
    }
    watch.stop()
    delays.sort()
    print("etcd: a publish is seen after \(delays[20]) us (median), \(delays[39]) us (largest)")
    // The median, because a busy machine may delay any single one.
    #expect(delays[20] < 100_000)
  }

  @Test(arguments: ServiceProcess.Kind.installed)
  func survivesItsService(_ kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let directory = try service.directory()
    let keeper = try RecordKeeper(directory)
    defer { keeper.stop() }
    let (gone, kept) = (testRecord("gone"), testRecord("kept"))
    try keeper.publish(gone, isCreateOnly: false, testCall)
    try keeper.publish(kept, isCreateOnly: false, testCall)
    let told = Told()
    let watch = try PayloadWatch(directory, prefix: "") { told.add($0) }
    #expect(eventually { told.texts.sorted() == ["+gone@1", "+kept@1"] })
    service.kill()
    keeper.remove(gone, Call(until: .after(milliseconds: 200)))
    usleep(500_000)
    try service.restartEmpty()
    #expect(eventually(within: 15_000) { told.texts.last == "-gone" })
    usleep(1_500_000)
    #expect(!told.texts.contains("-kept"))
    watch.stop()
  }

  @Test func stopsPromptly() throws {
    let service = try ServiceProcess(.ours)
    let directory = try service.directory()
    let watch = try PayloadWatch(directory, prefix: "") { _ in }
    usleep(100_000)
    let start = Clock.now()
    watch.stop()
    watch.stop()
    #expect(Clock.now() - start < 500_000_000)
    // Even if nobody answers, and by being released.
    service.kill()
    do {
      let other = try PayloadWatch(directory, prefix: "") { _ in }
      usleep(300_000)
      withExtendedLifetime(other) {}
    }
    #expect(Clock.now() - start < 1_500_000_000)
  }

  @Test func aHandlerMayStopItsWatch() throws {
    let service = try ServiceProcess(.ours)
    let directory = try service.directory()
    let keeper = try RecordKeeper(directory)
    defer { keeper.stop() }
    for name in ["a", "b", "c"] {
      try keeper.publish(testRecord(name), isCreateOnly: false, testCall)
    }
    let told = Told()
    let own = Lock<PayloadWatch?>(nil)
    let watch = try PayloadWatch(directory, prefix: "") { change in
      told.add(change)
      while own.withLock({ $0 == nil }) { usleep(1000) }
      own.withLock { $0 }?.stop()
    }
    own.withLock { $0 = watch }
    usleep(500_000)
    #expect(told.texts.count == 1)
    own.withLock { $0 = nil }
  }

  @Test func aHandlerThatEndedItsWatchIsWaitedFor() throws {
    let cluster = try Cluster()
    let store = try cluster.store()
    let memory = Memory(4096)
    try store.register("a", [memory.buffer])
    let hasStopped = Atomic(false)
    let isOver = Atomic(false)
    let own = Lock<PayloadWatch?>(nil)
    let watch = try store.watch(prefix: "") { _ in
      while own.withLock({ $0 == nil }) { usleep(1000) }
      own.withLock { $0 }?.stop()
      hasStopped.store(true, ordering: .sequentiallyConsistent)
      usleep(300_000)
      isOver.store(true, ordering: .sequentiallyConsistent)
    }
    own.withLock { $0 = watch }
    #expect(eventually { hasStopped.load(ordering: .sequentiallyConsistent) })
    store.close()
    let wasOver = isOver.load(ordering: .sequentiallyConsistent)
    #expect(wasOver)
    own.withLock { $0 = nil }
  }

  @Test func handlersMayStopEachOther() throws {
    let cluster = try Cluster()
    let store = try cluster.store()
    let memory = Memory(4096)
    try store.register("a", [memory.buffer])
    let watches = Lock<[PayloadWatch]>([])
    let entered = Atomic(0)
    let left = Atomic(0)
    for index in 0..<2 {
      let watch = try store.watch(prefix: "") { _ in
        entered.wrappingAdd(1, ordering: .sequentiallyConsistent)
        // Both are running by then.
        while watches.withLock({ $0.count < 2 })
          || entered.load(ordering: .sequentiallyConsistent) < 2
        {
          usleep(1000)
        }
        watches.withLock { $0[1 - index] }.stop()
        left.wrappingAdd(1, ordering: .sequentiallyConsistent)
      }
      watches.withLock { $0.append(watch) }
    }
    #expect(eventually { left.load(ordering: .sequentiallyConsistent) == 2 })
    store.close()
    watches.withLock { $0 = [] }
  }

  @Test func noHandlerRunsAfterItsStore() throws {
    let cluster = try Cluster()
    let (other, store) = (try cluster.store(), try cluster.store())
    defer { other.close() }
    let isOver = Atomic(false)
    let memory = Memory(4096)
    let publisher = try WorkerThread.start(name: "publish") {
      while !isOver.load(ordering: .relaxed) {
        _ = try? other.register("a", [memory.buffer])
        try? other.unregister("a")
      }
    }
    let running = Atomic(0)
    let count = Atomic(0)
    let isGone = Atomic(false)
    let wrong = Atomic(0)
    let watches = try (0..<3).map { _ in
      try store.watch(prefix: "") { _ in
        running.wrappingAdd(1, ordering: .sequentiallyConsistent)
        count.wrappingAdd(1, ordering: .sequentiallyConsistent)
        usleep(150_000)
        if isGone.load(ordering: .sequentiallyConsistent) {
          wrong.wrappingAdd(1, ordering: .relaxed)
        }
        running.wrappingSubtract(1, ordering: .sequentiallyConsistent)
      }
    }
    #expect(eventually { running.load(ordering: .relaxed) > 0 })
    // Its own thread ends one at the same time: neither call may return too early.
    let ender = try WorkerThread.start(name: "end") {
      watches[0].stop()
      if count.load(ordering: .relaxed) == 0 { wrong.wrappingAdd(1, ordering: .relaxed) }
    }
    store.close()
    isGone.store(true, ordering: .sequentiallyConsistent)
    let runningCount = running.load(ordering: .sequentiallyConsistent)
    #expect(runningCount == 0)
    let countAtEnd = count.load(ordering: .sequentiallyConsistent)
    ender.join()
    usleep(300_000)
    isOver.store(true, ordering: .relaxed)
    publisher.join()
    let (countLater, wrongCount) = (count.load(ordering: .relaxed), wrong.load(ordering: .relaxed))
    #expect(countLater == countAtEnd && wrongCount == 0)
    #expect(code { _ = try store.watch(prefix: "") { _ in } } == .invalidHandle)
    withExtendedLifetime(watches) {}
  }

  @Test func aHandlerMayCloseItsStore() throws {
    let cluster = try Cluster()
    let store = try cluster.store()
    let memory = Memory(4096)
    try store.register("a", [memory.buffer])
    let entered = Atomic(0)
    let count = Atomic(0)
    let watch = try store.watch(prefix: "") { [weak store] _ in
      entered.wrappingAdd(1, ordering: .relaxed)
      // Meanwhile another thread closes it and waits for this handler.
      usleep(200_000)
      store?.close()
      count.wrappingAdd(1, ordering: .relaxed)
    }
    #expect(eventually { entered.load(ordering: .relaxed) == 1 })
    store.close()
    let (enteredCount, endedCount) = (
      entered.load(ordering: .relaxed), count.load(ordering: .relaxed)
    )
    #expect(enteredCount == 1 && endedCount == 1)
    watch.stop()
  }

  @Test(arguments: ServiceProcess.Kind.installed.filter { $0 != .redis })
  func aWatchAtRestUsesNoProcessor(_ kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let directory = try service.directory()
    let keeper = try RecordKeeper(directory)
    defer { keeper.stop() }
    try keeper.publish(testRecord("a"), isCreateOnly: false, testCall)
    let clock = Atomic<clockid_t>(-1)
    let watch = try PayloadWatch(directory, prefix: "") { _ in
      // CPU time of the watch's thread.
      var own = clockid_t()
      if pthread_getcpuclockid(pthread_self(), &own) == 0 { clock.store(own, ordering: .relaxed) }
    }
    #expect(eventually { clock.load(ordering: .relaxed) != -1 })
    func used() -> Int {
      var time = timespec()
      clock_gettime(clock.load(ordering: .relaxed), &time)
      return time.tv_sec * 1_000_000 + time.tv_nsec / 1000
    }
    usleep(200_000)
    let before = used()
    // Longer than the silence after which etcd is probed.
    usleep(6_000_000)
    let microseconds = used() - before
    print("\(kind): a watch at rest for 6 s used \(microseconds) us")
    #expect(microseconds < 60_000)
    watch.stop()
  }
}
