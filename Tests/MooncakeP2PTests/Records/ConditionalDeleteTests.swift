import Glibc
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import Testing

/// Keys that several processes put: a process that deletes its own value must spare one that
/// another puts at the same moment.
@Suite(.serialized)
struct ConditionalDeleteTests {
  @Test(arguments: ServiceProcess.Kind.installed)
  func aNewerValueIsSpared(kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let (mine, anothers) = (try service.directory(), try service.directory())
    let former = MetadataEntry(key: mine.headKey("a"), value: "former")
    let newer = MetadataEntry(key: former.key, value: "newer")
    var lost: [String] = []
    for round in 0..<200 {
      try mine.store.put(former, lease: nil, testCall)
      let writer = try WorkerThread.start(name: "put") {
        usleep(UInt32(round % 20) * 50)
        try? anothers.store.put(newer, lease: nil, testCall)
      }
      usleep(UInt32(round / 20 % 10) * 50)
      try mine.delete(former, testCall)
      writer.join()
      let value = try mine.store.get(former.key, testCall)
      if value != newer.value { lost.append("round \(round): \(value ?? "nothing")") }
    }
    #expect(lost == [])
  }

  @Test(arguments: ServiceProcess.Kind.installed)
  func onlyOneOfManyPutsIfAbsent(kind: ServiceProcess.Kind) throws {
    let service = try ServiceProcess(kind)
    let stores = try (0..<4).map { _ in try service.store() }
    for round in 0..<20 {
      let winners = Winners()
      let threads = try stores.indices.map { index in
        try WorkerThread.start(name: "put") {
          let entry = MetadataEntry(key: "mooncake/k\(round)", value: "\(index)")
          let isPut = try? stores[index].putIfAbsent(entry, lease: nil, testCall)
          if isPut == true { winners.add(index) }
        }
      }
      for thread in threads { thread.join() }
      let value = try stores[0].get("mooncake/k\(round)", testCall)
      #expect(winners.all.count == 1 && value == winners.all.first.map { "\($0)" })
    }
  }

  private final class Winners: Sendable {
    private let indexes = Lock<[Int]>([])
    func add(_ index: Int) { indexes.withLock { $0.append(index) } }
    var all: [Int] { indexes.withLock { $0 } }
  }
}
