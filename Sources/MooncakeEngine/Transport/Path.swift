import MooncakeBase
import MooncakeSystem

/// A way to one peer: a group of connections, a mapped process, a pair of network cards. It moves
/// slices, and ends them as completed, canceled or late. What it cannot move it gives back through
/// its `SegmentLink`, where the router chooses another path.
package protocol Path: AnyObject, Sendable {
  /// The name of its transport.
  var transportName: String { get }
  /// Peer and path, for messages.
  var description: String { get }
  /// A bit among the paths to one segment.
  var mark: UInt64 { get }
  var traits: PathTraits { get }
  var health: PathHealth { get }
  /// Where its peer may still store what was sent before; nil if nothing can land late on it.
  var gate: WriteGate? { get }
  /// Whether what is submitted now is expected to move.
  var isUsable: Bool { get }
  /// Bytes queued and not ended.
  var load: Int { get }
  /// Bytes that it has moved.
  var movedBytes: UInt64 { get }
  /// Changes whenever a part of a slice arrives.
  var partialArrivalCount: UInt64 { get }

  /// Makes an attempt to come back, in the background, if one is due.
  func retryIfDue(_ now: UInt64)

  /// Whether a run should find out now if a path that is not usable works again. The caller then
  /// submits to it; others are told no for a while.
  func mayProbe(_ now: UInt64) -> Bool

  /// Moves to `refused` what the peer has not registered. Only for paths that check ranges.
  func check(_ run: inout SliceRun)

  /// Queues or moves the slices of a run and takes them out of it; leaves those that must go
  /// another way in `refused`.
  func submit(_ run: inout SliceRun)

  /// Moves a range at once if that needs no waiting; false if it must be submitted.
  func copyAtOnce(
    _ opcode: Opcode, _ local: UnsafeMutableRawPointer, _ remote: UInt64, _ count: Int
  ) -> Bool

  /// Takes it out of use. Queued slices go to the successor; without one they end in the usual
  /// ways.
  func retire(successor: PathSuccessor?)
}

extension Path {
  package var partialArrivalCount: UInt64 { 0 }
  package func retryIfDue(_ now: UInt64) {}
  package func mayProbe(_ now: UInt64) -> Bool { false }
  package func check(_ run: inout SliceRun) {}
  package func copyAtOnce(
    _ opcode: Opcode, _ local: UnsafeMutableRawPointer, _ remote: UInt64, _ count: Int
  ) -> Bool { false }
}

/// What the router must know of a path before it gives it slices.
package struct PathTraits: Sendable {
  /// It looks ranges up itself, in what the peer has registered at that moment.
  package var checksRanges = false
  /// It can move a range at once, in the thread that asks.
  package var copiesAtOnce = false
  /// It comes back by itself once slices are queued on it, so they may wait there.
  package var waitsForPeer = false
  /// It holds back writes while earlier ones may still land.
  package var waitsForFences = false
  /// Requests of at least twice as many bytes are cut into pieces of this size.
  package var pieceBytes = Int.max
  /// Its share of bulk among the paths of one transport.
  package var weight = 1

  package init() {}
}

/// Where the slices of a path go that is taken out of use.
package struct PathSuccessor: Sendable {
  /// The name now belongs to another process than the one that slices were sent to.
  package var isRestarted: Bool
  package var resubmit: @Sendable (SlicePointer) -> Void

  package init(isRestarted: Bool, resubmit: @escaping @Sendable (SlicePointer) -> Void) {
    self.isRestarted = isRestarted
    self.resubmit = resubmit
  }
}

/// Slices of one batch for one path.
package struct SliceRun {
  package private(set) var slices = SliceQueue()
  /// Of all slices; stays at its maximum instead of wrapping around.
  package private(set) var byteCount = 0
  /// Of the largest slice.
  package private(set) var largestBytes = 0
  /// Whether the submitter does something else than waiting next.
  package let isAsynchronous: Bool
  /// Whether it comes from a path that fails: the thread drives other work, so it must not copy.
  package let isHandedOver: Bool
  /// What could not be moved.
  package var refused = SliceQueue()
  /// The exclusive drivers that slices were queued on. Others note themselves before they queue.
  package var drivers = DriverSet()

  package init(isAsynchronous: Bool, isHandedOver: Bool = false) {
    self.isAsynchronous = isAsynchronous
    self.isHandedOver = isHandedOver
  }

  @inline(__always)
  package mutating func append(_ slice: SlicePointer) {
    let length = slice.pointee.length
    let (sum, overflow) = byteCount.addingReportingOverflow(length)
    byteCount = overflow ? .max : sum
    if length > largestBytes { largestBytes = length }
    slices.append(slice)
  }

  /// Takes all slices out.
  @inline(__always)
  package mutating func takeSlices() -> SliceQueue {
    byteCount = 0
    largestBytes = 0
    return slices.takeAll()
  }

  @inline(__always)
  package mutating func popFirst() -> SlicePointer? { slices.popFirst() }

  /// Gives back what could not be moved by the path with this mark.
  package mutating func markRefused(_ mark: UInt64) {
    var cursor = refused.first
    while let slice = cursor {
      slice.pointee.triedPaths |= mark
      cursor = slice.pointee.next
    }
  }

  package var isEmpty: Bool { slices.isEmpty }

  package var first: SlicePointer? { slices.first }
}
