import Glibc
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Testing

/// Closing a store while the metadata service is frozen. The header allows five seconds.
@Suite(.enabled(if: ServiceProcess.Kind.etcd.isInstalled, "etcd is not installed"))
struct StoreCloseTests {
  private func store(_ service: ServiceProcess) throws -> P2PStore {
    var engine = TransferEngine.Options()
    engine.transports = ["tcp"]
    var options = P2PStore.Options()
    options.metadataURI = service.uri
    options.drainMilliseconds = 200
    return try P2PStore(engineOptions: engine, options)
  }

  private func milliseconds(_ body: () throws -> Void) rethrows -> UInt64 {
    let begin = Clock.now()
    try body()
    return (Clock.now() - begin) / 1_000_000
  }

  /// Calls that ask the service end as canceled, whatever their timeout.
  @Test func callsThatWaitForTheServiceEndAtOnce() throws {
    let service = try ServiceProcess(.etcd)
    let store = try store(service)
    let model = Memory(1000, seed: 1)
    try store.register("here", [model.buffer])
    service.freeze()
    defer { service.thaw() }
    var operation = StoreOperation()
    operation.timeoutMilliseconds = 60_000
    operation.cancellation = try Cancellation()
    let canBeCanceled = operation
    let calls: [@Sendable () throws -> Void] = [
      { _ = try store.get("there", into: nil, GetOptions(), canBeCanceled) },
      { _ = try store.get("there too", into: nil, GetOptions(), StoreOperation()) },
      { _ = try store.list(prefix: "", canBeCanceled) },
      { try store.remove("here", canBeCanceled) },
      { try store.register("new", [model.buffer], RegisterOptions(), canBeCanceled) },
    ]
    let ends = Lock<[UInt64]>([])
    let threads = try calls.map { call in
      try WorkerThread.start(name: "call") {
        expect(.canceled) { try call() }
        ends.withLock { $0.append(Clock.now()) }
      }
    }
    usleep(300_000)
    let begin = Clock.now()
    let closing = milliseconds { store.close() }
    for thread in threads { thread.join() }
    let last = (ends.withLock { $0.max()! } - begin) / 1_000_000
    #expect(last < 1500, "\(last) ms")
    #expect(closing < 5000, "\(closing) ms")
  }

  /// A get's request to the service ends with the get: the store does not wait for it, and it does
  /// not poll a descriptor number that may be another file's by then.
  @Test func aLookForHoldersEndsWithItsGet() throws {
    let service = try ServiceProcess(.etcd)
    let (origin, receiver) = (try store(service), try store(service))
    let model = Memory(8 << 20, seed: 2)
    var shards = RegisterOptions()
    shards.shardBytes = 64 << 10
    try origin.register("m", [model.buffer], shards)
    var operation = StoreOperation()
    operation.timeoutMilliseconds = 2000
    operation.cancellation = try Cancellation()
    operation.progress = { progress in
      if origin.engine.isClosing { return true }
      if progress.phase != .transferring {
        // Longer than the interval between reports.
        usleep(150_000)
        return true
      }
      service.freeze()
      origin.engine.close()
      return true
    }
    expect(.timeout) {
      _ = try receiver.get("m", into: nil, GetOptions(), operation)
    }
    operation = StoreOperation()
    let closing = milliseconds { receiver.close() }
    service.thaw()
    // The records are left to their lease; telling the service may take two seconds.
    #expect(closing < 2900, "\(closing) ms")
    origin.close()
  }
}
