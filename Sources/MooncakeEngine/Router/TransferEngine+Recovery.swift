import MooncakeBase
import MooncakeSystem
import Synchronization

extension TransferEngine {
  private static let recoveryMilliseconds: UInt64 = 3_000

  /// What connections to a segment call when they need a fresh descriptor. They hold the engine
  /// weakly: it may be closed by then.
  package func handlers(for name: String) -> TCPPeer.Handlers {
    TCPPeer.Handlers(
      trouble: { [weak self] in
        guard let self, let id = segments.id(of: name), id != 0,
          let segment = try? segments.segment(id)
        else { return }
        recover(segment, nil)
      },
      refusal: { [weak self] slice in
        guard let self else { return }
        guard let segment = try? segments.segment(slice.pointee.task.pointee.segment) else {
          return Batch.end(
            slice, .failed(.notRegistered), reason: "segment \(name) was closed mid-transfer")
        }
        recover(segment, slice)
      })
  }

  /// Refetches a descriptor in the background and then submits the slice again.
  package func recover(_ segment: OpenSegment, _ slice: SlicePointer?) {
    if let slice {
      if slice.pointee.isRefetched {
        return Batch.end(
          slice, .failed(.notRegistered), reason: describeRefusal(segment, slice))
      }
      slice.pointee.isRefetched = true
    }
    // First, so that a cancel finds the segment even after it is closed.
    recoveries.add(segment)
    switch segment.enqueueRecovery(slice) {
    case .first(let late):
      watch(segment, until: late)
      if workers.run({ [self] in runRecovery(segment, mayAsk: true) }) { return }
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
    caller.run(at: Deadline(nanoseconds: deadline)) { [weak self, weak segment] in
      guard let self, let segment else { return }
      var (late, next) = segment.takeLate(Clock.now())
      while let slice = late.popFirst() {
        Batch.end(
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
          guard mayAsk else { throw MooncakeError(.system, "no thread could be started for it") }
          try refresh(
            segment, call(until: last).within(milliseconds: Self.recoveryMilliseconds))
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
  func endCanceledRecoveries() {
    for segment in recoveries.all {
      var canceled = segment.takeCanceled()
      while let slice = canceled.popFirst() { endCanceled(segment, slice) }
    }
  }

  private func endCanceled(_ segment: OpenSegment, _ slice: SlicePointer) {
    Batch.end(slice, .canceled, reason: "segment \(segment.name): canceled")
  }

  private func finishRecovery(
    _ segment: OpenSegment, _ slice: SlicePointer, _ failure: MooncakeError?
  ) {
    if slice.pointee.batch.isCancelRequested || isClosing {
      return endCanceled(segment, slice)
    }
    if let failure {
      let isLate = slice.pointee.deadline <= Clock.now()
      return Batch.end(
        slice, isLate ? .timeout : .failed(failure.code),
        reason: "\(describeRefusal(segment, slice)); asking the peer again: \(failure.message)")
    }
    resubmit(segment, slice)
  }

  /// Queues a slice again on the segment's current route.
  package func resubmit(_ segment: OpenSegment, _ slice: SlicePointer) {
    let route = segment.route
    let table = segment.id == 0 ? local.buffers.snapshot : route.table
    let verdict = table.check(
      slice.pointee.remote, UInt64(slice.pointee.length), slice.pointee.opcode.requiredAccess)
    guard verdict == .allowed else {
      return Batch.end(
        slice, .failed(verdict == .accessDenied ? .accessDenied : .notRegistered),
        reason: describeRefusal(segment, slice))
    }
    do throws(MooncakeError) {
      // A loop that has stopped would never end the slice.
      try whileOpen { () throws(MooncakeError) in
        let endpoint = route.connections.leastBusy()
        var queue = SliceQueue()
        queue.append(slice)
        let byteCount = slice.pointee.length
        endpoint.push(queue, byteCount: byteCount)
        endpoint.loop.kick()
      }
    } catch {
      Batch.end(slice, .canceled, reason: "segment \(segment.name): \(error.message)")
    }
  }

  /// Sends a slice over TCP that shared memory could not move.
  package func fallBack(_ slice: SlicePointer) {
    let id = slice.pointee.task.pointee.segment
    guard let segment = try? segments.segment(id) else {
      return Batch.end(
        slice, .failed(.invalidHandle), reason: "segment \(id) was closed mid-transfer")
    }
    let table = id == 0 ? local.buffers.snapshot : segment.route.table
    let verdict = table.check(
      slice.pointee.remote, UInt64(slice.pointee.length), slice.pointee.opcode.requiredAccess)
    if verdict == .allowed { resubmit(segment, slice) } else { recover(segment, slice) }
  }

  private func describeRefusal(_ segment: OpenSegment, _ slice: SlicePointer) -> String {
    let address = String(slice.pointee.remote, radix: 16)
    return "segment \(segment.name): \(slice.pointee.opcode) of \(slice.pointee.length) bytes at "
      + "0x\(address): the range is not inside one buffer that the peer has registered for it"
  }
}
