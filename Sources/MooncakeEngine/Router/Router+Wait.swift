import MooncakeSystem

extension Router {
  /// Polling a running batch does a driver's work if no other thread does.
  package func drivePolled(_ batch: Batch) {
    if batch.isTerminal { return }
    let set = batch.drivers
    _ = drivers.help(set)
    _ = drivers.onlyExclusive(of: set)?.pollIfFree()
  }

  /// Drives what carries the batch, or sleeps while other threads do.
  package func waitUntilTerminal(_ batch: Batch, _ deadline: Deadline) -> Bool {
    var spinEnd: UInt64 = 0
    while !batch.isTerminal {
      let set = batch.drivers
      if drivers.help(set) {
        if deadline.hasPassed { return batch.isTerminal }
        continue
      }
      if let driver = drivers.onlyExclusive(of: set) {
        if batch.drive(driver, of: set, until: deadline) {
          if batch.isTerminal { return true }
          if deadline.hasPassed { return false }
          if batch.drivers != set { continue }
        } else if spinEnd == 0 {
          // The driver may be asleep on its sockets and not know of the submit yet.
          driver.kick()
        }
      }
      let now = Clock.now()
      if spinEnd == 0 { spinEnd = now &+ spinNanoseconds }
      // For the last pieces of a large copy, other threads need less time than a wake-up takes.
      if now < spinEnd && (!batch.isBulk || drivers.hasCooperative(set)) {
        relaxProcessor()
        continue
      }
      return batch.sleep(until: deadline)
    }
    return true
  }
}
