// The frame of every C function: finds the engine, runs the body, turns an error into a code and
// the thread's message.
import CMooncake
import MooncakeBase
import MooncakeEngine

/// Runs `body` and returns `MOONCAKE_OK` or the code of what it threw.
@inline(__always)
func nativeCall(
  function: StaticString = #function, _ body: () throws(MooncakeError) -> Void
) -> Int32 {
  Globals.prepare()
  do throws(MooncakeError) {
    try body()
    return 0
  } catch {
    return failed(function, error)
  }
}

/// As `nativeCall`, with the engine behind a handle of mooncake.h.
@inline(__always)
func nativeCall(
  _ handle: OpaquePointer?, function: StaticString = #function,
  _ body: (TransferEngine) throws(MooncakeError) -> Void
) -> Int32 {
  do throws(MooncakeError) {
    try EngineTable.shared.with(number(of: handle), .native) { record throws(MooncakeError) in
      try body(record.engine)
    }
    return 0
  } catch {
    return failed(function, error)
  }
}

/// As `nativeCall`, with the object behind another handle of mooncake.h.
func nativeCall<Object: HandleObject>(
  _ handle: OpaquePointer?, _ type: Object.Type, function: StaticString = #function,
  _ body: (Object) throws(MooncakeError) -> Void
) -> Int32 {
  do throws(MooncakeError) {
    try HandleTable.shared.with(handle, type, body)
    return 0
  } catch {
    return failed(function, error)
  }
}

@inline(never)
private func failed(_ function: StaticString, _ error: MooncakeError) -> Int32 {
  report(function, error.message)
  return error.code.rawValue
}

/// Stores a failure as the thread's message, and logs it at debug level.
@inline(never)
func report(_ function: StaticString, _ cause: String) {
  Globals.prepare()
  ThreadState.setMessage(function, cause)
  // The log is locked while its callback runs.
  if ThreadState.isInsideLogCallback { return }
  Log.unlimited(.debug, ThreadState.message.map { String(cString: $0) } ?? cause)
}

/// The number inside a handle of mooncake.h.
@inline(__always)
func number(of handle: OpaquePointer?) -> UInt64 { UInt64(UInt(bitPattern: handle)) }

/// Checks an array argument and its length in elements.
@inline(__always)
func checkArray<Element>(
  _ pointer: UnsafePointer<Element>?, _ count: UInt64, _ argument: StaticString,
  limit: Int = 1 << 20
) throws(MooncakeError) -> Int {
  if pointer == nil && count > 0 {
    throw MooncakeError(.invalidArgument, "\(argument) is null but count is \(count)")
  }
  if count > UInt64(limit) {
    throw MooncakeError(.full, "count is \(count), at most \(limit) go into one call")
  }
  return Int(count)
}

/// Checks that a result pointer is not null.
@inline(__always)
func checkOutput<Value>(
  _ pointer: UnsafeMutablePointer<Value>?, _ argument: StaticString
) throws(MooncakeError) -> UnsafeMutablePointer<Value> {
  guard let pointer else { throw MooncakeError(.invalidArgument, "\(argument) is null") }
  return pointer
}

/// Checks the access rights that a caller gives.
func checkAccess(_ bits: UInt32) throws(MooncakeError) -> Access {
  let all: Access = [.remoteRead, .remoteWrite]
  if bits & ~all.rawValue != 0 {
    throw MooncakeError(
      .invalidArgument, "access 0x\(String(bits, radix: 16)) has unknown bits")
  }
  return Access(rawValue: bits)
}
