import MooncakeBase
import Synchronization

/// How a request or slice ended, in one word so that it can be published atomically.
package struct Outcome: Equatable, Sendable {
  package let rawValue: UInt32

  package init(rawValue: UInt32) { self.rawValue = rawValue }

  package static let waiting = Outcome(rawValue: 0)
  package static let completed = Outcome(.completed, nil)
  package static let canceled = Outcome(.canceled, .canceled)
  package static let timeout = Outcome(.timeout, .timeout)

  package static func failed(_ code: MooncakeError.Code) -> Outcome {
    switch code {
    case .canceled: .canceled
    case .timeout: .timeout
    default: Outcome(.failed, code)
    }
  }

  private init(_ state: TransferState, _ code: MooncakeError.Code?) {
    let magnitude = code.map { UInt32(-$0.rawValue) } ?? 0
    rawValue = UInt32(state.rawValue) | magnitude << 8
  }

  package var state: TransferState { TransferState(rawValue: Int32(rawValue & 0xFF)) ?? .failed }

  package var error: MooncakeError.Code? {
    MooncakeError.Code(rawValue: -Int32(rawValue >> 8))
  }
}

/// One request of a batch.
package struct TransferTask: ~Copyable {
  // The batch owns the memory that holds its tasks.
  package unowned(unsafe) let batch: Batch
  private let outcomeWord = Atomic<UInt32>(0)
  private let failureWord = Atomic<UInt32>(0)
  private let remainingSlices = Atomic<UInt32>(0)
  /// The life of the target's process that pieces have completed in; 0 before the first.
  private let life = Atomic<UInt32>(0)
  private let transferredBytes = Atomic<UInt64>(0)
  /// The target.
  package var segment: SegmentID

  package init(batch: Batch, segment: SegmentID) {
    self.batch = batch
    self.segment = segment
  }

  package var outcome: Outcome { Outcome(rawValue: outcomeWord.load(ordering: .acquiring)) }

  package var status: TransferStatus {
    let outcome = self.outcome
    return TransferStatus(
      state: outcome.state, error: outcome.error,
      transferredBytes: transferredBytes.load(ordering: .relaxed))
  }

  /// Sets the number of slices of the request, before any is queued.
  package func start(sliceCount: Int) {
    outcomeWord.store(0, ordering: .relaxed)
    failureWord.store(0, ordering: .relaxed)
    transferredBytes.store(0, ordering: .relaxed)
    remainingSlices.store(UInt32(sliceCount), ordering: .relaxed)
  }

  /// As above, for a request that was cut into pieces.
  package func start(pieceCount: Int) {
    life.store(0, ordering: .relaxed)
    start(sliceCount: pieceCount)
  }

  /// Notes where a piece has completed; false if other pieces have in another life of the target,
  /// so that no memory holds, or held, all of them.
  func noteLife(_ new: UInt32) -> Bool {
    let (isFirst, known) = life.compareExchange(expected: 0, desired: new, ordering: .relaxed)
    return isFirst || known == new
  }

  /// Counts one slice as ended; if it was the last, returns the task's outcome, which `publish`
  /// must then be called with.
  @inline(__always)
  package func endSlice(_ outcome: Outcome, byteCount: Int) -> Outcome? {
    if outcome == .completed {
      transferredBytes.wrappingAdd(UInt64(byteCount), ordering: .relaxed)
    } else {
      // The first failure decides the task's outcome.
      _ = failureWord.compareExchange(
        expected: 0, desired: outcome.rawValue, ordering: .relaxed)
    }
    // Acquire-release: whoever ends the last slice must see what the other ends wrote.
    let left = remainingSlices.wrappingSubtract(1, ordering: .acquiringAndReleasing).newValue
    assert(left != .max, "more slices of a request ended than it has")
    if left != 0 { return nil }
    let failure = failureWord.load(ordering: .relaxed)
    return failure == 0 ? .completed : Outcome(rawValue: failure)
  }

  /// Bytes of the slices that completed.
  package var byteCount: UInt64 { transferredBytes.load(ordering: .relaxed) }

  /// Makes the end visible to pollers.
  @inline(__always)
  package func publish(_ final: Outcome) {
    outcomeWord.store(final.rawValue, ordering: .releasing)
  }
}
