import MooncakeBase
import MooncakeSystem
import Synchronization

// What becomes of slices that a path gives back.
extension Router {
  /// Queues a slice on the best path that it has not tried. Without one, its segment's descriptor
  /// is fetched anew, which also makes new paths; after that it fails with the reason of each.
  package func place(_ segment: OpenSegment, _ slice: SlicePointer, after error: MooncakeError?) {
    // A cancel that finds the slice on no path must not miss it on the next one.
    let cancels = cancelCount.load(ordering: .sequentiallyConsistent)
    if slice.pointee.batch.isCancelRequested { return endCanceled(segment, slice) }
    // A driver that has stopped would never end the slice.
    do throws(MooncakeError) {
      try whileOpen { () throws(MooncakeError) in
        drivers.kickExclusive(place(segment, segment.route, slice, after: error))
      }
      if cancelCount.load(ordering: .sequentiallyConsistent) != cancels {
        drivers.requestSweeps()
      }
    } catch {
      fail(slice, .canceled, reason: "segment \(segment.name): \(error.message)")
    }
  }

  /// As above while open; returns the drivers to kick.
  func place(
    _ segment: OpenSegment, _ route: SegmentRoute, _ slice: SlicePointer,
    after error: MooncakeError?
  ) -> DriverSet {
    guard table(of: segment, route).check(slice) == .allowed else {
      recover(segment, slice)
      return DriverSet()
    }
    if error != nil { slice.pointee.attempts = 0 }
    guard let choice = route.choose(excluding: slice.pointee.triedPaths, now()) else {
      placeLater(segment, route, slice, after: error)
      return DriverSet()
    }
    // Nothing of it is under way now.
    slice.pointee.life = route.life
    var run = SliceRun(isAsynchronous: true, isHandedOver: error != nil)
    run.append(slice)
    return submit(segment, route, &run, on: choice)
  }

  /// No path takes the slice: fetches the descriptor once, or fails it.
  func placeLater(
    _ segment: OpenSegment, _ route: SegmentRoute, _ slice: SlicePointer,
    after error: MooncakeError?
  ) {
    // What was sent was meant for the process that had it; a new descriptor may be of another.
    if error == nil, !slice.pointee.isRefetched, !slice.pointee.wasSent {
      return recover(segment, slice)
    }
    fail(
      slice, .failed(error?.code ?? .unreachable),
      reason: describeLoss(segment, route, slice, error))
  }

  private func describeLoss(
    _ segment: OpenSegment, _ route: SegmentRoute, _ slice: SlicePointer, _ error: MooncakeError?
  ) -> String {
    let reasons = route.describeFailures(besides: error?.message ?? "")
    guard let error else {
      return "segment \(segment.name): \(slice.pointee.opcode) of \(slice.pointee.length) bytes: "
        + "no path to the peer works" + (reasons.isEmpty ? "" : ": \(reasons)")
    }
    return reasons.isEmpty ? error.message : "\(error.message); other paths: \(reasons)"
  }

  /// Fetches a descriptor anew in the background and then places the slice again.
  package func recover(_ segment: OpenSegment, _ slice: SlicePointer?) {
    if let slice {
      if slice.pointee.isRefetched {
        return fail(
          slice, .failed(.notRegistered), reason: describeRefusal(segment, slice))
      }
      slice.pointee.isRefetched = true
    }
    // First, so that a cancel finds the segment even after it is closed.
    recoveries.add(segment)
    switch segment.enqueueRecovery(slice, now()) {
    case .first(let late):
      watch(segment, until: late)
      if host?.runInBackground({ [self] in runRecovery(segment, mayAsk: true) }) ?? false { return }
      // The caller may be driving connections, so it must not wait for a peer.
      runRecovery(segment, mayAsk: false)
    case .behind(let late):
      recoveries.remove(segment)
      watch(segment, until: late)
    case .canceled:
      recoveries.remove(segment)
      if let slice { endCanceled(segment, slice) }
    }
  }

  /// At `deadline`, ends the slices that are overdue. Slices of one recovery have different
  /// deadlines: the earliest must neither end the fetch for the others nor wait for its end.
  private func watch(_ segment: OpenSegment, until deadline: UInt64?) {
    guard let deadline else { return }
    // Waiting slices keep the segment alive; without any, nobody needs it.
    host?.run(at: Deadline(nanoseconds: deadline)) { [weak self, weak segment] in
      guard let self, let segment else { return }
      var (late, next) = segment.takeLate(now())
      while let slice = late.popFirst() {
        fail(
          slice, .timeout,
          reason: "\(describeRefusal(segment, slice)); the deadline passed before the peer said "
            + "what it has registered now: check whether its process hangs")
      }
      watch(segment, until: next)
    }
  }

  private func runRecovery(_ segment: OpenSegment, mayAsk: Bool) {
    repeat {
      let last = Deadline(nanoseconds: segment.beginFetch())
      var failure: MooncakeError?
      if segment.id != 0 && !isClosing {
        do throws(MooncakeError) {
          guard mayAsk, let host else {
            throw MooncakeError(.system, "no thread could be started for it")
          }
          try host.refresh(segment, until: last)
        } catch {
          failure = error
        }
      }
      var fetched = segment.endFetch()
      while let slice = fetched.popFirst() { finishRecovery(segment, slice, failure) }
    } while !segment.endRecovery()
    recoveries.remove(segment)
  }

  /// Ends the slices of canceled batches that wait for a descriptor. Nothing else touches their
  /// memory.
  package func endCanceledRecoveries() {
    for segment in recoveries.all {
      var canceled = segment.takeCanceled()
      while let slice = canceled.popFirst() { endCanceled(segment, slice) }
    }
  }

  private func endCanceled(_ segment: OpenSegment, _ slice: SlicePointer) {
    fail(slice, .canceled, reason: "segment \(segment.name): canceled")
  }

  private func finishRecovery(
    _ segment: OpenSegment, _ slice: SlicePointer, _ failure: MooncakeError?
  ) {
    if slice.pointee.batch.isCancelRequested || isClosing {
      return endCanceled(segment, slice)
    }
    if let failure {
      let isLate = slice.pointee.deadline <= now()
      return fail(
        slice, isLate ? .timeout : .failed(failure.code),
        reason: "\(describeRefusal(segment, slice)); asking the peer again: \(failure.message)")
    }
    // The new descriptor may have brought the paths back.
    slice.pointee.triedPaths = 0
    resubmit(segment, slice)
  }

  /// Queues a slice again on the segment's current route.
  package func resubmit(_ segment: OpenSegment, _ slice: SlicePointer) {
    let verdict = table(of: segment, segment.route).check(slice)
    guard verdict == .allowed else {
      return fail(
        slice, .failed(verdict == .accessDenied ? .accessDenied : .notRegistered),
        reason: describeRefusal(segment, slice))
    }
    place(segment, slice, after: nil)
  }

  private func describeRefusal(_ segment: OpenSegment, _ slice: SlicePointer) -> String {
    let address = String(slice.pointee.remote, radix: 16)
    let what =
      "segment \(segment.name): \(slice.pointee.opcode) of \(slice.pointee.length) bytes at "
      + "0x\(address)"
    let route = segment.route
    if table(of: segment, route).check(slice) == .allowed, !route.hasUsable(excluding: 0, now()) {
      return "\(what): no path to the peer works: \(route.describeFailures())"
    }
    return "\(what): the range is not inside one buffer that the peer has registered for it"
  }
}
