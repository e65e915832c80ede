import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import Synchronization
import Testing

/// Ports, named by holders' records, that accept connections and never answer.
private final class SilentHolders {
  private let listeners: [Int32]
  let addresses: [HolderAddress]

  init(_ count: Int) throws {
    var listeners: [Int32] = []
    var addresses: [HolderAddress] = []
    for number in 0..<count {
      let socket = try Socket.listening(on: SocketAddress(numeric: "127.0.0.1", port: 0)!)
      let port = try socket.localAddress().port
      addresses.append(
        HolderAddress(
          holding: .random(in: 1 ... .max), rpc: "127.0.0.1:\(port)", segment: "silent-\(number)"))
      listeners.append(socket.release())
    }
    (self.listeners, self.addresses) = (listeners, addresses)
  }

  deinit { for listener in listeners { close(listener) } }

  /// Publishes that they hold a payload.
  func join(_ name: String, _ info: PayloadInfo, through store: P2PStore) {
    for address in addresses {
      store.keeper.put(
        HolderRecord(
          PayloadSummary(
            name: name, version: info.version!, size: info.size, shardBytes: info.shardBytes,
            shardCount: info.shardCount, bufferCount: 1, publishedMilliseconds: 1,
            isWritable: false),
          holder: address, isOrigin: false, isComplete: true),
        Call(until: .after(milliseconds: 10_000)))
    }
  }
}

@Suite struct SilentHolderTests {
  private func milliseconds(_ body: () throws -> Void) rethrows -> UInt64 {
    let begin = Clock.now()
    try body()
    return (Clock.now() - begin) / 1_000_000
  }

  /// Waiting for each would take two seconds.
  @Test func fifteenSilentHoldersHoldAGetUpForAMoment() throws {
    let cluster = try Cluster()
    let (origin, other, receiver) = (
      try cluster.store(), try cluster.store(), try cluster.store()
    )
    let model = Memory(300_000, seed: 1)
    let silent = try SilentHolders(15)
    silent.join("m", try origin.register("m", [model.buffer]), through: other)
    let memory = Memory(300_000)
    let time = try milliseconds { _ = try receiver.get("m", into: [memory.buffer]) }
    #expect(memory.holds(model))
    #expect(time < 1500, "\(time) ms")
    let part = Memory(1000)
    let reading = try milliseconds {
      try receiver.read("m", offset: 5, into: part.bytes.baseAddress!, length: 1000)
    }
    #expect(reading < 1500, "\(reading) ms")
  }

  @Test func silentHoldersOfOneGetHoldNoOtherUp() throws {
    let cluster = try Cluster()
    let (origin, other, receiver) = (
      try cluster.store(), try cluster.store(), try cluster.store()
    )
    let silent = try SilentHolders(3)
    let model = Memory(300_000, seed: 2)
    let names = (0..<24).map { "m\($0)" }
    let memories = try names.map { name in
      let memory = Memory(300_000, seed: 2)
      silent.join(name, try origin.register(name, [memory.buffer]), through: other)
      return memory
    }
    let good = Lock(0)
    let time = try milliseconds {
      let threads = try names.map { name in
        try WorkerThread.start(name: "get") {
          let memory = Memory(300_000)
          guard (try? receiver.get(name, into: [memory.buffer])) != nil, memory.holds(model)
          else { return }
          good.withLock { $0 += 1 }
          try? receiver.deleteReplica(name)
        }
      }
      for thread in threads { thread.join() }
    }
    #expect(good.withLock { $0 } == names.count)
    // Eight at a time, one group after another, they would take eighteen.
    #expect(time < 6000, "\(time) ms")
    withExtendedLifetime(memories) {}
  }

  @Test func cancelDeadlineAndCloseEndAGetThatWaits() throws {
    let cluster = try Cluster()
    let (origin, other) = (try cluster.store(), try cluster.store())
    let model = Memory(300_000, seed: 3)
    let silent = try SilentHolders(2)
    silent.join("m", try origin.register("m", [model.buffer]), through: other)
    origin.close()

    var operation = StoreOperation()
    operation.timeoutMilliseconds = 300
    let store = try cluster.store()
    let deadline = milliseconds {
      expect(.timeout) { _ = try store.get("m", into: nil, GetOptions(), operation) }
    }
    #expect((250..<1500).contains(deadline), "\(deadline) ms")

    operation = StoreOperation()
    let cancellation = try Cancellation()
    operation.cancellation = cancellation
    let canceler = try WorkerThread.start(name: "cancel") {
      usleep(200_000)
      cancellation.cancel()
    }
    let canceled = milliseconds {
      expect(.canceled) { _ = try store.get("m", into: nil, GetOptions(), operation) }
    }
    canceler.join()
    #expect((150..<1500).contains(canceled), "\(canceled) ms")

    let closer = try WorkerThread.start(name: "close") {
      usleep(200_000)
      store.close()
    }
    let closed = milliseconds {
      expect(.canceled) { _ = try store.get("m", into: nil, GetOptions(), StoreOperation()) }
    }
    closer.join()
    #expect((150..<1500).contains(closed), "\(closed) ms")
  }
}
