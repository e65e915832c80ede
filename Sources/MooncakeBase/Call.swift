import MooncakeSystem

/// How long a call to a peer or a service may take, and what ends it early.
package struct Call: Sendable {
  package let deadline: Deadline
  /// A descriptor that becomes readable to cancel the call; -1 for none.
  package let cancellation: Int32

  package init(until deadline: Deadline, cancellation: Int32 = -1) {
    self.deadline = deadline
    self.cancellation = cancellation
  }

  /// Does not wait: the work is done in the background.
  package static let background = Call(until: Deadline(nanoseconds: 0))

  package var isCanceled: Bool { Waiting.isReadable(cancellation) }

  /// Whether its time is over or it was canceled.
  package var isOver: Bool { deadline.hasPassed || isCanceled }

  /// The same call with less time.
  package func within(milliseconds: UInt64) -> Call { within(.after(milliseconds: milliseconds)) }

  /// The same call, which ends by another deadline too.
  package func within(_ limit: Deadline) -> Call {
    Call(until: min(deadline, limit), cancellation: cancellation)
  }

  /// Sleeps, but not beyond the deadline; returns true as soon as it is canceled.
  package func sleep(milliseconds: UInt64) -> Bool {
    Waiting.sleep(
      until: within(milliseconds: milliseconds).deadline, cancellation: cancellation)
  }
}
