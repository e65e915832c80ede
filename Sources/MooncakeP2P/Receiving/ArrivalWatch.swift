import MooncakeEngine
import MooncakeSystem

/// Tells whether bytes still arrive for a read. A long read proves nothing against a holder whose
/// link is slow or has many readers; silence does.
struct ArrivalWatch {
  private let batch: BatchID
  private let segment: SegmentID
  private var bytes: UInt64 = 0
  private var arrivals: UInt64
  /// When bytes last arrived; 0: none yet.
  private(set) var lastArrival: UInt64 = 0
  private let begin = Clock.now()

  /// Watches a batch of one request.
  init(_ engine: TransferEngine, _ batch: BatchID, from segment: SegmentID) {
    self.batch = batch
    self.segment = segment
    arrivals = engine.partialArrivalCount(from: segment)
  }

  /// Whether anything has arrived since the last look. Byte counts leave out incomplete slices, so
  /// this also notices data that the segment sends for another read.
  mutating func hasArrived(_ engine: TransferEngine) -> Bool {
    let bytes = (try? engine.poll(batch, request: 0))?.transferredBytes ?? 0
    let arrivals = engine.partialArrivalCount(from: segment)
    if bytes == self.bytes && arrivals == self.arrivals { return false }
    (self.bytes, self.arrivals, lastArrival) = (bytes, arrivals, Clock.now())
    return true
  }

  /// Whether the read has received any complete slice.
  var hasBytes: Bool { bytes > 0 }

  /// Whether nothing has arrived for that long. `others`: when data last arrived for another read
  /// that this one may be queued behind.
  func isSilent(for milliseconds: UInt64, others: UInt64 = 0) -> Bool {
    let last = max(begin, lastArrival, others)
    return Clock.now() &- last > milliseconds &* 1_000_000
  }
}
