import Synchronization

/// The endpoints of a loop that have something new for its driver. Any thread pushes, the driver
/// takes all.
struct ReadyStack: ~Copyable {
  /// An endpoint's place on the stack.
  struct Link: ~Copyable {
    fileprivate let isScheduled = Atomic<Bool>(false)
    /// The endpoint below; belongs to who set `isScheduled`, until it is taken.
    fileprivate let next = Atomic<UInt>(0)
  }

  private let top = Atomic<UInt>(0)

  // Endpoints may be scheduled after the loop has stopped.
  deinit { takeAll { _ in } }

  var isEmpty: Bool { top.load(ordering: .sequentiallyConsistent) == 0 }

  /// Puts an endpoint on the stack unless it is there.
  func push(_ endpoint: TCPEndpoint) {
    if endpoint.readyLink.isScheduled.exchange(true, ordering: .acquiringAndReleasing) { return }
    let pointer = UInt(bitPattern: Unmanaged.passRetained(endpoint).toOpaque())
    var old = top.load(ordering: .relaxed)
    while true {
      endpoint.readyLink.next.store(old, ordering: .relaxed)
      let (isPushed, current) = top.weakCompareExchange(
        expected: old, desired: pointer, successOrdering: .sequentiallyConsistent,
        failureOrdering: .relaxed)
      if isPushed { return }
      old = current
    }
  }

  /// Takes all endpoints, the last one first.
  @inline(__always)
  func takeAll(_ body: (TCPEndpoint) -> Void) {
    var cursor = top.exchange(0, ordering: .sequentiallyConsistent)
    while let pointer = UnsafeRawPointer(bitPattern: cursor) {
      let endpoint = Unmanaged<TCPEndpoint>.fromOpaque(pointer).takeRetainedValue()
      cursor = endpoint.readyLink.next.load(ordering: .relaxed)
      // Before the inbox is read: a later push schedules again.
      endpoint.readyLink.isScheduled.store(false, ordering: .sequentiallyConsistent)
      body(endpoint)
    }
  }
}
