import Glibc
import Synchronization

/// The right to touch a loop's endpoints and sockets. One thread has it at a time.
struct DriverToken: ~Copyable {
  private let flag = Atomic<Bool>(false)
  #if DEBUG
    private let holder = Atomic<UInt>(0)
  #endif

  /// Sequentially consistent, as the wake-up protocol asks.
  var isTaken: Bool { flag.load(ordering: .sequentiallyConsistent) }

  @inline(__always)
  func tryTake() -> Bool {
    if flag.load(ordering: .relaxed) { return false }
    if flag.exchange(true, ordering: .sequentiallyConsistent) { return false }
    #if DEBUG
      holder.store(pthread_self(), ordering: .relaxed)
    #endif
    return true
  }

  @inline(__always)
  func giveBack() {
    assertHeld()
    #if DEBUG
      holder.store(0, ordering: .relaxed)
    #endif
    flag.store(false, ordering: .sequentiallyConsistent)
  }

  /// In debug builds, stops a thread that touches a driver's state without being the driver.
  @inline(__always)
  func assertHeld() {
    #if DEBUG
      assert(holder.load(ordering: .relaxed) == pthread_self(), "this thread is not the driver")
    #endif
  }
}
