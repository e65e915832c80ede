import Glibc
import MooncakeSystem

/// Waits until a condition holds; false if it does not in time.
package func eventually(within milliseconds: UInt64 = 8000, _ condition: () -> Bool) -> Bool {
  let deadline = Deadline.after(milliseconds: milliseconds)
  while !condition() {
    if deadline.hasPassed { return false }
    usleep(1000)
  }
  return true
}

/// Milliseconds that `body` takes.
package func elapsedMilliseconds(_ body: () throws -> Void) rethrows -> UInt64 {
  let start = Clock.now()
  try body()
  return (Clock.now() - start) / 1_000_000
}
