import MooncakeBase
import MooncakeSystem
import Synchronization

/// Through it the paths to one segment give slices back. It holds the router weakly, since a path
/// may outlive it.
package final class SegmentLink: @unchecked Sendable {
  // Unchecked: `router` is set in `init`; reading a weak reference is atomic.
  package let segmentName: String
  private weak var router: Router?
  private let pathCount = Atomic<Int>(0)
  private let lastReport = Atomic<UInt64>(0)

  private static let reportNanoseconds: UInt64 = 100_000_000

  package init(_ segmentName: String, _ router: Router?) {
    self.segmentName = segmentName
    self.router = router
  }

  /// A mark for a new path, which no path to the segment has now.
  package func makeMark() -> UInt64 {
    let used = segment?.route.ways.reduce(0) { $0 | $1.path.mark } ?? 0
    while true {
      let mark: UInt64 = 1 << UInt64(pathCount.wrappingAdd(1, ordering: .relaxed).oldValue % 64)
      if used & mark == 0 || used == .max { return mark }
    }
  }

  private var segment: OpenSegment? {
    guard let router, let id = router.segments.id(of: segmentName) else { return nil }
    return try? router.segments.segment(id)
  }

  /// A path fails: the descriptor may be out of date.
  package func reportTrouble() {
    guard let router else { return }
    let now = router.now()
    let last = lastReport.load(ordering: .relaxed)
    if now &- last < Self.reportNanoseconds { return }
    lastReport.store(now, ordering: .relaxed)
    guard let segment, segment.id != 0 else { return }
    router.recover(segment, nil)
  }

  /// The target refused a slice's range. Nothing of it can land any more.
  package func refused(_ slice: SlicePointer) {
    withSegment(of: slice, .failed(.notRegistered)) { router, segment in
      router.recover(segment, slice)
    }
  }

  /// A path may not move a slice: its peer's registrations or the kernel forbid it. Another may.
  package func refusedHere(_ slice: SlicePointer, on mark: UInt64) {
    withSegment(of: slice, .failed(.invalidHandle)) { router, segment in
      slice.pointee.triedPaths |= mark
      router.place(segment, slice, after: nil)
    }
  }

  /// A path cannot move a slice, of which nothing can land on it any more.
  package func giveUp(_ slice: SlicePointer, on mark: UInt64, _ error: MooncakeError) {
    withSegment(of: slice, .failed(error.code), error.message) { router, segment in
      // The paths may lead to another process by now, whose memory is not what was meant.
      if slice.pointee.wasSent, !segment.route.has(mark) {
        return router.fail(slice, .failed(error.code), reason: error.message)
      }
      slice.pointee.triedPaths |= mark
      router.place(segment, slice, after: error)
    }
  }

  /// Takes from a path that fails the slices that another can move at once; the path keeps the
  /// rest. Nothing of what it offers was sent, or can land any more.
  package func moveAway(_ slices: inout SliceQueue, from mark: UInt64, _ error: MooncakeError) {
    guard let first = slices.first, let router,
      let segment = try? router.segments.segment(first.pointee.task.pointee.segment),
      segment.route.has(mark), segment.route.hasUsable(excluding: mark, router.now())
    else { return }
    var kept = SliceQueue()
    while let slice = slices.popFirst() {
      let excluded = slice.pointee.triedPaths | mark
      if segment.route.hasUsable(excluding: excluded, router.now()) {
        slice.pointee.triedPaths = excluded
        router.place(segment, slice, after: error)
      } else {
        kept.append(slice)
      }
    }
    slices = kept
  }

  private func withSegment(
    of slice: SlicePointer, _ outcome: Outcome, _ reason: String = "",
    _ body: (Router, OpenSegment) -> Void
  ) {
    guard let router else {
      return Batch.end(slice, .canceled, reason: "segment \(segmentName): engine destroyed")
    }
    let id = slice.pointee.task.pointee.segment
    guard let segment = try? router.segments.segment(id) else {
      return router.fail(
        slice, outcome,
        reason: (reason.isEmpty ? "" : reason + "; ")
          + "segment \(segmentName) was closed mid-transfer")
    }
    body(router, segment)
  }
}
