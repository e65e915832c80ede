import CompletionQueueTransport
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// A transport that the conformance suite runs over.
enum TransportKind: String, CaseIterable, Sendable {
  case tcp
  /// With TCP as the fallback.
  case sharedMemory
  /// Completion queues and keys, as RDMA has them, over devices that are threads.
  case completionQueue

  /// Transports whose transfers wait for a stopped peer.
  static let needingThePeer: [TransportKind] = [.tcp]

  /// Transports that the processes of a crowd have.
  static let inCrowds: [TransportKind] = [.tcp, .sharedMemory]

  var transports: [String] {
    switch self {
    case .tcp: return ["tcp"]
    case .sharedMemory: return ["shm", "tcp"]
    case .completionQueue:
      CQTransport.register
      return [CQTransport.name]
    }
  }
}

/// An engine on loopback that uses one transport.
func makeEngine(
  _ kind: TransportKind = .tcp, change: (inout TransferEngine.Options) -> Void = { _ in }
) throws(MooncakeError) -> TransferEngine {
  var options = TransferEngine.Options()
  options.transports = kind.transports
  options.defaultTimeoutMilliseconds = 20_000
  options.ioThreads = 2
  change(&options)
  return try TransferEngine(options)
}

/// What an engine on loopback gives to its transports.
func makeContext(
  buffers: BufferTable = BufferTable(), threadCount: Int = 1
) throws(MooncakeError) -> TransportContext {
  var listen = ListenOptions()
  listen.bindAddress = "127.0.0.1"
  return TransportContext(
    buffers: buffers, drivers: DriverTable(), gates: WriteGates(),
    address: try ListenAddress.open(listen).address, threadCount: threadCount,
    connectionsPerPeer: 2, spinNanoseconds: 1000, processors: nil, cancellation: -1,
    background: { _ in false })
}

/// An initiator, and a target that it has opened.
final class EnginePair: Sendable {
  let initiator: TransferEngine
  let target: TransferEngine
  let segment: SegmentID

  init(_ kind: TransportKind, register: (TransferEngine) throws -> Void = { _ in }) throws {
    target = try makeEngine(kind)
    do {
      try register(target)
      initiator = try makeEngine(kind)
    } catch {
      target.close()
      throw error
    }
    do {
      segment = try initiator.openSegment(target.name)
    } catch {
      initiator.close()
      target.close()
      throw error
    }
  }

  func close() {
    initiator.close()
    target.close()
  }

  func read(
    into local: UnsafeMutableRawPointer?, from remote: UnsafeMutableRawPointer, _ count: Int
  ) -> TransferRequest {
    TransferRequest(
      opcode: .read, segment: segment, source: local,
      targetOffset: UInt64(UInt(bitPattern: remote)),
      length: UInt64(count))
  }

  func write(
    from local: UnsafeMutableRawPointer?, to remote: UnsafeMutableRawPointer, _ count: Int
  ) -> TransferRequest {
    TransferRequest(
      opcode: .write, segment: segment, source: local,
      targetOffset: UInt64(UInt(bitPattern: remote)), length: UInt64(count))
  }
}

/// Runs `body` with a connected pair whose target has registered `memory`, then closes both
/// engines.
func withPair(
  _ kind: TransportKind, registering memory: GuardedMemory? = nil,
  access: Access = [.remoteRead, .remoteWrite], _ body: (EnginePair) throws -> Void
) throws {
  let pair = try EnginePair(kind) { target in
    guard let memory, memory.count > 0 else { return }
    try target.register(memory.address, length: UInt64(memory.count), access: access)
  }
  defer { pair.close() }
  try body(pair)
}

extension TransferEngine {
  func transfer(
    _ requests: [TransferRequest], timeoutMilliseconds: UInt64 = 0
  ) throws(MooncakeError) {
    try requests.withUnsafeBufferPointer { requests throws(MooncakeError) in
      try transfer(requests, timeoutMilliseconds: timeoutMilliseconds)
    }
  }

  func submit(
    _ batch: BatchID, _ requests: [TransferRequest], timeoutMilliseconds: UInt64 = 0,
    notification: Notification? = nil
  ) throws(MooncakeError) {
    try requests.withUnsafeBufferPointer { requests throws(MooncakeError) in
      try submit(
        batch, requests, timeoutMilliseconds: timeoutMilliseconds, notification: notification)
    }
  }

  /// Submits requests in a new batch.
  func start(
    _ requests: [TransferRequest], timeoutMilliseconds: UInt64 = 0
  ) throws(MooncakeError) -> BatchID {
    let batch = try createBatch(capacity: max(1, requests.count))
    try submit(batch, requests, timeoutMilliseconds: timeoutMilliseconds)
    return batch
  }

  /// The status of each request.
  func statuses(_ batch: BatchID, count: Int) throws(MooncakeError) -> [TransferStatus] {
    var statuses: [TransferStatus] = []
    for index in 0..<count { statuses.append(try poll(batch, request: index)) }
    return statuses
  }
}

/// The code of the error that `body` throws; nil if it throws none.
func failureCode(_ body: () throws(MooncakeError) -> Void) -> MooncakeError.Code? {
  do throws(MooncakeError) {
    try body()
    return nil
  } catch {
    return error.code
  }
}
