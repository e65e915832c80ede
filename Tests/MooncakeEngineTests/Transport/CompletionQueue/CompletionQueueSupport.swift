import CompletionQueueTransport
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

extension TransferEngine {
  /// The engine's transport over completion queues.
  var completionQueue: CQTransport {
    get throws {
      guard let found = transports.all.lazy.compactMap({ $0 as? CQTransport }).first else {
        throw MooncakeError(.unsupported, "the engine has no completion queues")
      }
      return found
    }
  }

  func paths(_ transport: String, to segment: SegmentID) throws -> [PathReport] {
    try paths(to: segment).filter { $0.transport == transport }
  }

  /// Moves a slice on another path than those marked, and returns how it ended.
  func move(
    _ request: TransferRequest, avoiding marks: UInt64, after error: MooncakeError? = nil
  ) throws -> BatchStatus {
    let segment = try segments.segment(request.segment)
    let batch = Batch(capacity: 1, pool: router.pool, drivers: drivers, announcer: nil)
    _ = try batch.beginSubmit(1)
    batch.prepare(
      0, segment: segment.id,
      Slice(
        task: batch.tasks, local: request.source!, remote: request.targetOffset,
        length: Int(request.length), deadline: Deadline.after(milliseconds: 5000).nanoseconds,
        opcode: request.opcode, isPooled: false))
    batch.slices.pointee.triedPaths = marks
    batch.publish(1, notification: nil)
    batch.endSubmit()
    router.place(segment, batch.slices, after: error)
    _ = batch.sleep(until: .after(milliseconds: 10_000))
    batch.waitUntilQuiet()
    return batch.status
  }
}
