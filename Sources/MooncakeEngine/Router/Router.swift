import MooncakeBase
import MooncakeSystem
import Synchronization

/// What the router needs from the engine that it works for.
package protocol RouterHost: AnyObject, Sendable {
  /// Fetches a segment's descriptor anew and replaces its route.
  func refresh(_ segment: OpenSegment, until deadline: Deadline) throws(MooncakeError)
  /// Runs on a thread that may wait; false if there is none.
  func runInBackground(_ body: @escaping @Sendable () -> Void) -> Bool
  /// Runs at a time, or earlier if the engine closes.
  func run(at deadline: Deadline, _ body: @escaping @Sendable () -> Void)
}

/// Cuts requests into slices, chooses their paths, and decides what becomes of those that a path
/// gives back. One for each engine.
package final class Router: @unchecked Sendable {
  // Unchecked: `host` is set once, before the router is shared; the rest is synchronized.
  package let local: LocalSegment
  package let segments = SegmentTable()
  package let drivers = DriverTable()
  package let pool = SlicePool()
  let spinNanoseconds: UInt64
  /// Segments whose descriptor is being fetched anew.
  let recoveries = RecoveringSegments()
  package weak var host: (any RouterHost)?
  private let clock: @Sendable () -> UInt64

  private let closing = Atomic<Bool>(false)
  private let activeSubmits = Atomic<Int>(0)
  private let failures = Atomic<UInt64>(0)
  /// Grows with each cancel, after its batch is marked.
  let cancelCount = Atomic<UInt64>(0)

  /// `clock` replaces `Clock` in tests.
  package init(
    local: LocalSegment, spinNanoseconds: UInt64,
    clock: @escaping @Sendable () -> UInt64 = { Clock.now() }
  ) {
    self.local = local
    self.spinNanoseconds = spinNanoseconds
    self.clock = clock
  }

  func now() -> UInt64 { clock() }

  /// Slices that failed while no path had them.
  package var failedSliceCount: UInt64 { failures.load(ordering: .relaxed) }

  func fail(_ slice: SlicePointer, _ outcome: Outcome, reason: @autoclosure () -> String) {
    failures.wrappingAdd(1, ordering: .relaxed)
    Batch.end(slice, outcome, reason: reason())
  }

  /// Has every driver look for slices of canceled batches, once one is marked.
  package func sweepCanceled() {
    cancelCount.wrappingAdd(1, ordering: .sequentiallyConsistent)
    drivers.requestSweeps()
    endCanceledRecoveries()
  }

  // MARK: Closing

  package var isClosing: Bool { closing.load(ordering: .sequentiallyConsistent) }

  package func checkOpen() throws(MooncakeError) {
    if isClosing { throw MooncakeError(.invalidHandle, "the engine was destroyed") }
  }

  /// Runs a short operation that queues transfers; `close` waits for it.
  @inline(__always)
  package func whileOpen<Result>(
    _ body: () throws(MooncakeError) -> Result
  ) throws(MooncakeError) -> Result {
    activeSubmits.wrappingAdd(1, ordering: .sequentiallyConsistent)
    defer { activeSubmits.wrappingSubtract(1, ordering: .releasing) }
    try checkOpen()
    return try body()
  }

  /// Nothing is queued any more; operations that had begun are waited for.
  package func close(_ willWait: () -> Void) {
    closing.store(true, ordering: .sequentiallyConsistent)
    willWait()
    // A submit that has passed the check ends within microseconds.
    while activeSubmits.load(ordering: .sequentiallyConsistent) > 0 { relaxProcessor() }
  }
}
