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

  private final class Output: Sendable {
    // Held while a line is written: lines never mix and a replaced sink is never called again.
    let sink = Lock<Sink?>(nil)
    let limiter = Lock(LogLimiter())
  }

  // Replaced only in a forked child, before it has a second thread, because a thread of the parent
  // may have held a lock at the fork. The child's lines go to stderr until it sets a sink.
  private nonisolated(unsafe) static var output: Output = {
    Fork.inChild { output = Output() }
    return Output()
  }()

  /// Drops lines below `level` from now on.
  public static func setLevel(_ level: Level) {
    threshold.store(level.rawValue, ordering: .relaxed)
  }

  /// Replaces the place where lines go; nil means stderr.
  public static func setSink(_ newSink: Sink?) { output.sink.withLock { $0 = newSink } }

  /// Uses the globals once, as `Fork.prepare` requires.
  package static func prepare() {
    _ = threshold.load(ordering: .relaxed)
    _ = output
  }

  // To the limiter, each call site is a kind; `peer` is whoever caused the line.

  package static func debug(
    _ message: @autoclosure () -> String, about peer: @autoclosure () -> String = "",
    file: StaticString = #fileID, line: UInt = #line
  ) {
    write(.debug, message, peer, .init(file, line))
  }

  package static func info(
    _ message: @autoclosure () -> String, about peer: @autoclosure () -> String = "",
    file: StaticString = #fileID, line: UInt = #line
  ) {
    write(.info, message, peer, .init(file, line))
  }

  package static func warning(
    _ message: @autoclosure () -> String, about peer: @autoclosure () -> String = "",
    file: StaticString = #fileID, line: UInt = #line
  ) {
    write(.warning, message, peer, .init(file, line))
  }

  package static func error(
    _ message: @autoclosure () -> String, about peer: @autoclosure () -> String = "",
    file: StaticString = #fileID, line: UInt = #line
  ) {
    write(.error, message, peer, .init(file, line))
  }

  /// Not rate-limited: for lines that only the host's own calls can cause.
  package static func unlimited(_ level: Level, _ message: @autoclosure () -> String) {
    if level.rawValue >= threshold.load(ordering: .relaxed) { send(level, message()) }
  }

  /// The host of "host:port", since connections of one peer differ in the port.
  package static func host(of peer: String) -> String {
    peer.utf8.lastIndex(of: UInt8(ascii: ":")).map { String(peer[..<$0]) } ?? peer
  }

  /// Reports the lines left out so far; called when an engine ends.
  package static func reportLeftOut() {
    for line in output.limiter.withLock({ $0.reports(now: Clock.now(), isEnd: true) }) {
      unlimited(.warning, line)
    }
  }

  private static func write(
    _ level: Level, _ message: () -> String, _ peer: () -> String, _ kind: LogLimiter.Kind
  ) {
    if level.rawValue < threshold.load(ordering: .relaxed) { return }
    let name = peer()
    let now = Clock.now()
    let isAdmitted = output.limiter.withLock { $0.admits(kind, name, now: now) }
    if isAdmitted {
      let line = message()
      let note = output.limiter.withLock { $0.note(kind, line) }
      send(level, note.map { "\(line) \($0)" } ?? line)
    }
    for line in output.limiter.withLock({ $0.reports(now: now) }) { unlimited(.warning, line) }
  }

  private static func send(_ level: Level, _ line: String) {
    let line = PrintableText.make(line)
    output.sink.withLock { sink in
      if let sink { return sink(level, line) }
      writeToStandardError(level, line)
    }
  }

  private static func writeToStandardError(_ level: Level, _ line: String) {
    // If the host has closed its standard error, number 2 may be a socket of ours; those are
    // close-on-exec, a real stderr is not.
    let flags = fcntl(STDERR_FILENO, F_GETFD)
    if flags < 0 || flags & FD_CLOEXEC != 0 { return }
    var now = timespec()
    clock_gettime(CLOCK_REALTIME, &now)
    var parts = tm()
    // localtime_r takes a lock that would stay locked in a forked child.
    _ = Fork.excluded { localtime_r(&now.tv_sec, &parts) }
    var stamp = [CChar](repeating: 0, count: 32)
    _ = strftime(&stamp, stamp.count, "%F %T", &parts)
    let time = stamp.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
    var text = "\(time).\(padded(now.tv_nsec / 1_000_000)) mooncake \(level): \(line)\n"
    // A single write keeps the line whole among other writers of the descriptor.
    withoutWriteSignals {
      _ = text.withUTF8 { Glibc.write(STDERR_FILENO, $0.baseAddress!, $0.count) }
    }
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
