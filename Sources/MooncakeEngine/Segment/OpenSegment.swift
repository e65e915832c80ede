import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// A segment opened by name. Its route is replaced whole when the peer's descriptor changes.
package final class OpenSegment: Sendable {
  package let id: SegmentID
  package let name: String
  private let routeBox: Lock<SegmentRoute>
  private let closed = Atomic<Bool>(false)

  /// Slices that wait for a fresh descriptor. They stay here during the fetch, so that a cancel can
  /// end them.
  private struct Recovery: @unchecked Sendable {
    /// Waiting for the next fetch.
    var waiting = SliceQueue()
    /// Waiting for the fetch in progress.
    var fetching = SliceQueue()
    var isRunning = false
    /// When to look for overdue slices next.
    var watched = UInt64.max
  }
  private let recovery = Lock(Recovery())

  package init(id: SegmentID, name: String, route: SegmentRoute) {
    self.id = id
    self.name = name
    routeBox = Lock(route)
  }

  /// The current view.
  package var route: SegmentRoute { routeBox.withLock { $0 } }

  /// Replaces the view unless the segment has been closed or the view is no longer `old`; returns
  /// whether it did.
  package func replaceRoute(_ old: SegmentRoute, with new: SegmentRoute) -> Bool {
    routeBox.withLock { route in
      if closed.load(ordering: .relaxed) || route !== old { return false }
      route = new
      return true
    }
  }

  package var isClosed: Bool { closed.load(ordering: .relaxed) }

  /// After this the view stays; returns it.
  package func close() -> SegmentRoute {
    routeBox.withLock { route in
      closed.store(true, ordering: .relaxed)
      return route
    }
  }

  /// What happened to a slice that needs a fresh descriptor. `watch`: when to call `takeLate`, if
  /// that is sooner than arranged before.
  package enum Enqueued {
    /// The caller must start a recovery.
    case first(watch: UInt64?)
    /// The running recovery fetches again for it.
    case behind(watch: UInt64?)
    /// It was not queued: its batch is canceled.
    case canceled
  }

  /// Queues a slice, or (nil) only asks for a fresh descriptor.
  package func enqueueRecovery(_ slice: SlicePointer?, _ now: UInt64) -> Enqueued {
    recovery.withLock { recovery in
      var watch: UInt64?
      if let slice {
        // If `takeCanceled` has already run, nobody would end it.
        if slice.pointee.batch.isCancelRequested { return .canceled }
        recovery.waiting.append(slice)
        // A watch whose time has passed without a look could not be started; start another.
        if slice.pointee.deadline < recovery.watched || recovery.watched <= now {
          recovery.watched = slice.pointee.deadline
          watch = recovery.watched
        }
      }
      defer { recovery.isRunning = true }
      return recovery.isRunning ? .behind(watch: watch) : .first(watch: watch)
    }
  }

  /// Slices whose deadlines are closer together than this are ended together.
  private static let watchNanoseconds: UInt64 = 10_000_000

  /// Takes the slices whose deadline has passed; `watch` says when to call this again, if at all.
  package func takeLate(_ now: UInt64) -> (late: SliceQueue, watch: UInt64?) {
    recovery.withLock { recovery in
      if now < recovery.watched { return (SliceQueue(), nil) }
      var late = recovery.fetching.removeAll { $0.pointee.deadline <= now }
      var more = recovery.waiting.removeAll { $0.pointee.deadline <= now }
      late.append(contentsOf: &more)
      let next = min(recovery.fetching.earliestDeadline, recovery.waiting.earliestDeadline)
      recovery.watched = next == .max ? .max : max(next, now &+ Self.watchNanoseconds)
      return (late, recovery.watched == .max ? nil : recovery.watched)
    }
  }

  /// Starts a fetch for all waiting slices; returns their last deadline.
  package func beginFetch() -> UInt64 {
    recovery.withLock { recovery in
      recovery.fetching.append(contentsOf: &recovery.waiting)
      return recovery.fetching.latestDeadline
    }
  }

  /// Takes the slices that the fetch was for.
  package func endFetch() -> SliceQueue { recovery.withLock { $0.fetching.takeAll() } }

  /// Takes the slices whose batch was canceled.
  package func takeCanceled() -> SliceQueue {
    recovery.withLock { recovery in
      if recovery.waiting.isEmpty && recovery.fetching.isEmpty { return SliceQueue() }
      var canceled = recovery.fetching.removeAll { $0.pointee.batch.isCancelRequested }
      var more = recovery.waiting.removeAll { $0.pointee.batch.isCancelRequested }
      canceled.append(contentsOf: &more)
      return canceled
    }
  }

  /// Ends the running recovery unless more slices are waiting; returns whether it ended.
  package func endRecovery() -> Bool {
    recovery.withLock { recovery in
      if !recovery.waiting.isEmpty { return false }
      recovery.isRunning = false
      return true
    }
  }
}

/// The segments opened by one engine.
package final class SegmentTable: Sendable {
  package static let capacity = 65_536

  private struct State: Sendable {
    /// Index is the id; 0 is the engine's own. Ids are never reused.
    var segments: [OpenSegment?] = []
    var ids: [MetadataKey: SegmentID] = [:]
    var openCounts: [SegmentID: Int] = [:]
  }

  private let state = Lock(State())

  package init() {}

  package func segment(_ id: SegmentID) throws(MooncakeError) -> OpenSegment {
    let found = state.withLock { state in
      id >= 0 && Int(id) < state.segments.count ? state.segments[Int(id)] : nil
    }
    guard let found else {
      throw MooncakeError(.invalidHandle, "segment \(id) is not open")
    }
    return found
  }

  package func id(of name: String) -> SegmentID? { state.withLock { $0.ids[MetadataKey(name)] } }

  package var all: [OpenSegment] { state.withLock { $0.segments.compactMap { $0 } } }

  /// Counts one more open of a known name.
  package func retain(_ name: String) -> OpenSegment? {
    state.withLock { state in
      guard let id = state.ids[MetadataKey(name)], let segment = state.segments[Int(id)] else {
        return nil
      }
      state.openCounts[id, default: 0] += 1
      return segment
    }
  }

  /// Adds a segment; if another thread was faster, counts one more open and `isNew` is false.
  package func insert(
    _ name: String, route: SegmentRoute
  ) throws(MooncakeError) -> (segment: OpenSegment, isNew: Bool) {
    let result: (OpenSegment, Bool)? = state.withLock { state in
      if let id = state.ids[MetadataKey(name)], let segment = state.segments[Int(id)] {
        state.openCounts[id, default: 0] += 1
        return (segment, false)
      }
      if state.ids.count >= Self.capacity || state.segments.count >= Int(SegmentID.max) {
        return nil
      }
      let id = SegmentID(state.segments.count)
      let segment = OpenSegment(id: id, name: name, route: route)
      state.segments.append(segment)
      state.ids[MetadataKey(name)] = id
      state.openCounts[id] = 1
      return (segment, true)
    }
    guard let result else {
      throw MooncakeError(.full, "\(Self.capacity) segments are open: close some")
    }
    return result
  }

  /// Counts one open less; returns the segment when that was the last.
  package func release(_ id: SegmentID) throws(MooncakeError) -> OpenSegment? {
    _ = try segment(id)
    return state.withLock { state in
      guard let count = state.openCounts[id], let segment = state.segments[Int(id)] else {
        return nil
      }
      if count > 1 {
        state.openCounts[id] = count - 1
        return nil
      }
      state.openCounts[id] = nil
      state.ids[MetadataKey(segment.name)] = nil
      state.segments[Int(id)] = nil
      return segment
    }
  }
}
