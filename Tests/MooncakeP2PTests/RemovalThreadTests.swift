import Glibc
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import MooncakeTestSupport
import Testing

@Suite struct RemovalThreadTests {
  /// More names are removed than there are threads for gets, and each removal waits for a reader.
  @Test func removalsThatWaitForReadersHoldNoGetUp() throws {
    let cluster = try Cluster()
    let store = try cluster.store(drainMilliseconds: 6000)
    let other = try cluster.store()
    let names = (0..<40).map { "m\($0)" }
    let (memory, model) = (Memory(1000, seed: 1), Memory(100_000, seed: 2))
    for name in names {
      try store.register(name, [memory.buffer])
      let holding = try #require(store.readers(of: name))
      let answer = holding.answer(
        ShardRequest(
          holding: holding.address.holding, version: holding.version, reader: 1, own: nil,
          have: ShardSet(count: 1), turn: 1, reading: [], limit: 1))
      #expect(answer.granted == [0])
    }
    try other.register("other", [model.buffer])
    for name in names { try other.remove(name) }
    // A name that is being withdrawn is in use by a call.
    #expect(eventually { names.contains { store.readers(of: $0) == nil } })
    usleep(300_000)
    let copy = Memory(100_000)
    let begin = Clock.now()
    _ = try store.get("other", into: [copy.buffer])
    let milliseconds = (Clock.now() - begin) / 1_000_000
    #expect(milliseconds < 2000, "\(milliseconds) ms")
    #expect(copy.holds(model))
  }
}
