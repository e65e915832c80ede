import Glibc
import MooncakeEngine
import MooncakeSystem

/// The deadline, cancellation and progress of one running operation. Used by its caller's thread.
package final class Bounds {
  package let deadline: Deadline
  private let operation: StoreOperation
  private let what: String
  private var nextReport: UInt64 = 0
  private static let reportNanoseconds: UInt64 = 100_000_000

  /// `what` begins the errors; an operation without a timeout gets the default, 0 for none.
  package init(_ operation: StoreOperation, _ what: String, defaultMilliseconds: UInt64) {
    self.operation = operation
    self.what = what
    let milliseconds =
      operation.timeoutMilliseconds == 0 ? defaultMilliseconds : operation.timeoutMilliseconds
    deadline = milliseconds == 0 ? .never : .after(milliseconds: milliseconds)
  }

  /// Becomes readable when the operation is to end; -1 if it cannot be canceled.
  package var cancellation: Int32 { operation.cancellation?.event.descriptor.rawValue ?? -1 }

  /// A call to the metadata service within these bounds, ten seconds at most.
  package var call: MetadataCall {
    MetadataCall(
      until: min(deadline, .after(milliseconds: 10_000)), cancellation: cancellation)
  }

  package var isCanceled: Bool {
    if cancellation < 0 { return false }
    var item = pollfd(fd: cancellation, events: Int16(POLLIN), revents: 0)
    return poll(&item, 1, 0) > 0
  }

  package var isOver: Bool { deadline.hasPassed || isCanceled }

  /// Throws once the operation is to end.
  package func check(_ phase: String) throws(EngineError) {
    if isCanceled { throw EngineError(.canceled, "\(what): canceled (\(phase))") }
    if deadline.hasPassed {
      throw EngineError(.timeout, "\(what): the deadline passed (\(phase))")
    }
  }

  /// Tells the caller how far it is, not too often; throws if it does not want to go on.
  package func report(_ progress: @autoclosure () -> StoreProgress, isLast: Bool = false)
    throws(EngineError)
  {
    guard let body = operation.progress else { return }
    let now = Clock.now()
    if now < nextReport && !isLast { return }
    nextReport = now &+ Self.reportNanoseconds
    if !body(progress()) {
      throw EngineError(.canceled, "\(what): canceled by the progress callback")
    }
  }
}
