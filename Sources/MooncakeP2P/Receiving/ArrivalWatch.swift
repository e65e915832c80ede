import MooncakeEngine
import MooncakeSystem

/// Tells whether bytes still come for a read. How long it takes says nothing of its holder where
/// links are slow or have many readers; that nothing comes does.
struct ArrivalWatch {
  private let batch: BatchID
  private let segment: SegmentID
  private var bytes: UInt64 = 0
  private var arrivals: UInt64
  /// When bytes came last; 0: none have.
  private(set) var lastArrival: UInt64 = 0
  private let begin = Clock.now()

  /// Watches a batch of one request.
  init(_ engine: TransferEngine, _ batch: BatchID, from segment: SegmentID) {
    self.batch = batch
    self.segment = segment
    arrivals = engine.partialArrivalCount(from: segment)
  }

  /// Whether anything has come since the last look. Parts of slices are not counted in bytes, so
  /// what comes from the segment for another read is seen here, too.
  mutating func hasArrived(_ engine: TransferEngine) -> Bool {
    let bytes = (try? engine.poll(batch, request: 0))?.transferredBytes ?? 0
    let arrivals = engine.partialArrivalCount(from: segment)
    if bytes == self.bytes && arrivals == self.arrivals { return false }
    (self.bytes, self.arrivals, lastArrival) = (bytes, arrivals, Clock.now())
    return true
  }

  /// Whether any byte of this read has come whole.
  var hasBytes: Bool { bytes > 0 }

  /// Whether nothing has come for so long. `others`: when something came last for another read
  /// that this one may be waiting behind.
  func isSilent(for milliseconds: UInt64, others: UInt64 = 0) -> Bool {
    let last = max(begin, lastArrival, others)
    return Clock.now() &- last > milliseconds &* 1_000_000
  }
}
