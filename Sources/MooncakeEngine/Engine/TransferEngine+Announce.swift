import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

extension TransferEngine: BatchAnnouncer {
  package func announce(_ batch: Batch) {
    let descriptor = engineEvent.load(ordering: .acquiring)
    if descriptor < 0 { return }
    var one: UInt64 = 1
    _ = write(descriptor, &one, 8)
  }

  package func run(
    _ callback: @escaping Batch.Callback, of batch: Batch, status: BatchStatus
  ) {
    let id = batch.id
    if callbacks.run({ callback(id, status) }) { return }
    Log.error("the callback of batch \(id) is not called: the engine was destroyed")
  }

  package func deliver(_ pending: Batch.PendingNotification, of batch: Batch) {
    let token = deliveries.add(until: pending.deadline) {
      batch.endNotification(
        MooncakeError(
          .timeout,
          "the notification was not sent: the deadline passed while all threads waited for peers"
        ))
    }
    let isRunning = workers.run { [self] in
      // False if it waited for a thread beyond its deadline and was reported as late.
      guard deliveries.take(token) else { return }
      do throws(MooncakeError) {
        let name = try segments.segment(pending.segment).name
        let call = call(until: Deadline(nanoseconds: pending.deadline))
        try RPCClient.notify(rpcAddress(of: name, call), pending.notification, call)
        batch.endNotification(nil)
      } catch {
        batch.endNotification(error)
      }
    }
    if !isRunning && deliveries.take(token) {
      batch.endNotification(MooncakeError(.canceled, "the engine was destroyed before it notified"))
    }
  }
}
