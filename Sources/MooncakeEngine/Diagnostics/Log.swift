import CLinux
import Glibc
import MooncakeSystem
import Synchronization

/// The process-wide log: one line a message, to stderr or to the host's callback.
public enum Log {
  /// Raw values are the `MOONCAKE_LOG_*` constants of the C header.
  public enum Level: Int32, Sendable, Comparable {
    case debug = 0
    case info = 1
    case warning = 2
    case error = 3
    case off = 4

    public static func < (left: Level, right: Level) -> Bool { left.rawValue < right.rawValue }
  }

  public typealias Sink = @Sendable (Level, String) -> Void

  private static let threshold = Atomic<Int32>(levelFromEnvironment().rawValue)
  private final class SinkBox: Sendable {
    // Held while a line is written: lines never mix and a replaced sink is never called again.
    let sink = Lock<Sink?>(nil)
  }

  // Replaced only in a forked child, before it has a second thread: another thread of the parent
  // may have held the lock at the fork. The child's lines go to stderr until it sets a sink.
  private nonisolated(unsafe) static var box: SinkBox = {
    pthread_atfork(nil, nil) { box = SinkBox() }
    return SinkBox()
  }()

  /// Drops lines below `level` from now on.
  public static func setLevel(_ level: Level) {
    threshold.store(level.rawValue, ordering: .relaxed)
  }

  /// Replaces the place where lines go; nil means stderr.
  public static func setSink(_ newSink: Sink?) { box.sink.withLock { $0 = newSink } }

  package static func debug(_ message: @autoclosure () -> String) { write(.debug, message) }
  package static func info(_ message: @autoclosure () -> String) { write(.info, message) }
  package static func warning(_ message: @autoclosure () -> String) { write(.warning, message) }
  package static func error(_ message: @autoclosure () -> String) { write(.error, message) }

  private static func write(_ level: Level, _ message: () -> String) {
    if level.rawValue < threshold.load(ordering: .relaxed) { return }
    let line = message()
    box.sink.withLock { sink in
      if let sink { return sink(level, line) }
      writeToStandardError(level, line)
    }
  }

  private static func writeToStandardError(_ level: Level, _ line: String) {
    var now = timespec()
    clock_gettime(CLOCK_REALTIME, &now)
    var parts = tm()
    localtime_r(&now.tv_sec, &parts)
    var stamp = [CChar](repeating: 0, count: 32)
    _ = strftime(&stamp, stamp.count, "%F %T", &parts)
    let time = stamp.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
    var text = "\(time).\(padded(now.tv_nsec / 1_000_000)) mooncake \(level): \(line)\n"
    // One write keeps the line whole among other writers of the descriptor.
    _ = text.withUTF8 { Glibc.write(STDERR_FILENO, $0.baseAddress!, $0.count) }
  }

  private static func padded(_ milliseconds: Int) -> String {
    String(String(1000 + milliseconds).dropFirst())
  }

  private static func levelFromEnvironment() -> Level {
    guard let value = getenv("MC_LOG_LEVEL") else { return .warning }
    switch String(cString: value).uppercased() {
    case "TRACE", "DEBUG": return .debug
    case "INFO": return .info
    case "ERROR": return .error
    case "OFF": return .off
    default: return .warning
    }
  }
}
