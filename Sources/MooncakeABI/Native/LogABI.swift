// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Section "Log" of mooncake.h.
import CMooncake
import MooncakeBase
import MooncakeEngine

/// A callback of the host with its context pointer.
private struct HostLogSink: @unchecked Sendable {
  // Unchecked: the host must be able to use its context on any thread.
  let callback: mooncake_log_callback_t
  let context: UnsafeMutableRawPointer?
}

/// Sends log lines to a callback or, if it is null, to stderr.
@c @implementation
package func mooncake_log_set_callback(
  _ callback: mooncake_log_callback_t?, _ context: UnsafeMutableRawPointer?
) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    try refuseInsideLogCallback()
    guard let callback else { return Log.setSink(nil) }
    let sink = HostLogSink(callback: callback, context: context)
    Log.setSink { level, line in
      ThreadState.duringLogCallback {
        line.withCString { sink.callback(level.rawValue, $0, sink.context) }
      }
    }
  }
}

/// Drops log lines below a level.
@c @implementation
package func mooncake_log_set_level(_ level: Int32) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    guard let level = Log.Level(rawValue: level) else {
      throw MooncakeError(.invalidArgument, "level \(level) is not one of MOONCAKE_LOG_*")
    }
    Log.setLevel(level)
  }
}

/// Throws inside the log callback, where the log is locked.
func refuseInsideLogCallback() throws(MooncakeError) {
  if ThreadState.isInsideLogCallback {
    throw MooncakeError(.invalidArgument, "a log callback must not call the library")
  }
}

/// Throws inside a callback: destroying an object waits for its callbacks, so it would wait for
/// itself.
func refuseInsideCallback() throws(MooncakeError) {
  if ThreadState.isInsideCallback {
    throw MooncakeError(
      .invalidArgument,
      "a callback must not call this function, which waits for callbacks: leave it to another "
        + "thread")
  }
}
