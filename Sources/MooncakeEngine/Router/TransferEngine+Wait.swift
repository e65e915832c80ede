import MooncakeSystem

extension TransferEngine {
  /// Polling a running batch does the loop's work if no other thread does.
  func drivePolled(_ batch: Batch) {
    if batch.isTerminal { return }
    if batch.usesSharedMemory, let sharedMemory { _ = sharedMemory.help() }
    batch.drivenLoop?.pollIfFree()
  }

  /// Drives the loop that carries the batch, or sleeps while another thread does.
  package func waitUntilTerminal(_ batch: Batch, _ deadline: Deadline) -> Bool {
    var spinEnd: UInt64 = 0
    while !batch.isTerminal {
      if batch.usesSharedMemory, let sharedMemory, sharedMemory.help() {
        if deadline.hasPassed { return batch.isTerminal }
        continue
      }
      if let loop = batch.drivenLoop {
        if batch.drive(loop, until: deadline) {
          if batch.isTerminal { return true }
          if deadline.hasPassed { return false }
        } else if spinEnd == 0 {
          // The driver may be asleep on its sockets and not know of the submit yet.
          loop.kick()
        }
      }
      let now = Clock.now()
      if spinEnd == 0 { spinEnd = now &+ spinNanoseconds }
      // For the last pieces of a large copy, other threads need less time than a wake-up takes.
      if now < spinEnd && (!batch.isBulk || batch.usesSharedMemory) {
        relaxProcessor()
        continue
      }
      return batch.sleep(until: deadline)
    }
    return true
  }
}
