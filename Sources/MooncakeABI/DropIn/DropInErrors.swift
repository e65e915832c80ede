// The frame of the functions of transfer_engine_c.h: its two kinds of error codes and how the
// engine's errors map to them.
import CMooncake
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// The drop-in layer's state of an engine.
final class DropInState: Sendable {
  /// Whether `installTransport` or `createTransferEngine` has installed TCP.
  let isTransportInstalled = Atomic<Bool>(false)
  /// Whether the engine is destroyed when the process ends.
  let endsWithProcess = Atomic<Bool>(false)
  /// The NIC priority matrix given by the host.
  let matrix = Lock(NICMatrix())
}

extension MooncakeError.Code {
  /// The `ERR_*` value, and the positive code that batch calls return.
  fileprivate var dropIn: (error: Int32, batch: Int32) {
    switch self {
    case .invalidArgument: (ERR_INVALID_ARGUMENT, 1)
    case .invalidHandle: (ERR_INVALID_ARGUMENT, 1)
    case .notRegistered: (ERR_ADDRESS_NOT_REGISTERED, 3)
    case .overlap: (ERR_ADDRESS_OVERLAPPED, 1)
    case .accessDenied: (ERR_ADDRESS_NOT_REGISTERED, 3)
    case .busy: (ERR_BATCH_BUSY, 4)
    case .full: (ERR_TOO_MANY_REQUESTS, 2)
    case .outOfMemory: (ERR_MEMORY, 302)
    case .addressInUse: (ERR_SOCKET, 102)
    case .unresolved: (ERR_DNS, 101)
    case .unreachable: (ERR_SOCKET, 102)
    case .protocolViolation: (ERR_MALFORMED_JSON, 103)
    case .notFound: (ERR_METADATA, 200)
    case .timeout: (ERR_METADATA, 200)
    case .canceled: (ERR_INVALID_ARGUMENT, 1)
    case .unsupported: (ERR_NOT_IMPLEMENTED, 8)
    case .system: (ERR_CONTEXT, 102)
    // Errors of the store, which the drop-in header does not have.
    case .exists, .notHeld, .sizeMismatch: (ERR_INVALID_ARGUMENT, 1)
    case .digestMismatch, .noHolder: (ERR_METADATA, 200)
    }
  }
}

/// Runs `body` with a drop-in engine; returns its result, or an `ERR_*` value.
@inline(__always)
func dropInCall(
  _ handle: transfer_engine_t?, function: StaticString = #function,
  _ body: (EngineRecord) throws(MooncakeError) -> Int32
) -> Int32 {
  do throws(MooncakeError) {
    return try EngineTable.shared.with(number(of: handle), .dropIn, body)
  } catch {
    return dropInFailure(function, error).error
  }
}

/// Runs a batch call: returns 0 or a positive code.
@inline(__always)
func dropInBatchCall(
  _ handle: transfer_engine_t?, function: StaticString = #function,
  _ body: (EngineRecord) throws(MooncakeError) -> Void
) -> Int32 {
  do throws(MooncakeError) {
    try EngineTable.shared.with(number(of: handle), .dropIn, body)
    return 0
  } catch {
    return dropInFailure(function, error).batch
  }
}

/// Runs `body` with a drop-in engine; nil if it throws.
@inline(__always)
func dropInValue<Value>(
  _ handle: transfer_engine_t?, function: StaticString = #function,
  _ body: (EngineRecord) throws(MooncakeError) -> Value?
) -> Value? {
  do throws(MooncakeError) {
    return try EngineTable.shared.with(number(of: handle), .dropIn, body)
  } catch {
    _ = dropInFailure(function, error)
    return nil
  }
}

/// Runs `body`, which opens a segment; every failure gives -1, because programs compare with that.
@inline(__always)
func dropInSegment(
  _ handle: transfer_engine_t?, function: StaticString = #function,
  _ body: (EngineRecord) throws(MooncakeError) -> Int32
) -> Int32 {
  dropInValue(handle, function: function, body) ?? ERR_INVALID_ARGUMENT
}

@inline(never)
private func dropInFailure(
  _ function: StaticString, _ error: MooncakeError
) -> (error: Int32, batch: Int32) {
  ThreadState.setMessage(function, error.message)
  // Log it, because programs look only there; but not inside the log callback, where the log is
  // locked.
  if !ThreadState.isInsideLogCallback, error.code != .busy, !error.isLogged {
    let message = ThreadState.message.map { String(cString: $0) }
    // One kind of line per function, so that a program repeating a bad call does not fill the log.
    Log.warning(message ?? error.message, file: function, line: 0)
  }
  return error.code.dropIn
}

/// The number inside a handle of transfer_engine_c.h.
@inline(__always)
func number(of handle: UnsafeMutableRawPointer?) -> UInt64 { UInt64(UInt(bitPattern: handle)) }

/// A `size_t` argument, which Swift imports as signed.
@inline(__always)
func unsigned(_ size: Int) -> UInt64 { UInt64(UInt(bitPattern: size)) }

/// Writes a text and truncates it silently.
func writeCut(
  _ text: String, _ buffer: UnsafeMutablePointer<CChar>?, _ capacity: Int
) throws(MooncakeError) {
  guard let buffer, capacity != 0 else {
    throw MooncakeError(.invalidArgument, "buf_out is null or buf_len is 0")
  }
  writePrefix(of: text, buffer, Int(clamping: unsigned(capacity)))
}
