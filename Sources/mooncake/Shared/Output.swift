import ArgumentParser
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// What the program prints on stdout.
enum Output {
  private static let lock = Lock<Bool>(false)
  /// Error number of the first failed write; 0 if none has failed.
  private static let failure = Atomic<Int32>(0)

  /// Writes a whole text at once, also into a pipe. After a failure nothing more is written.
  static func write(_ text: String) {
    lock.withLock { _ in
      var bytes = Array(text.utf8)[...]
      while !bytes.isEmpty && !hasFailed {
        let count = bytes.withUnsafeBytes { Glibc.write(STDOUT_FILENO, $0.baseAddress, $0.count) }
        if count >= 0 {
          bytes = bytes.dropFirst(count)
          continue
        }
        let error = errno
        if error == EINTR { continue }
        if error == EAGAIN {
          var item = pollfd(fd: STDOUT_FILENO, events: Int16(POLLOUT), revents: 0)
          _ = poll(&item, 1, -1)
          continue
        }
        failure.store(error, ordering: .relaxed)
      }
    }
  }

  static var hasFailed: Bool { failure.load(ordering: .relaxed) != 0 }

  /// Whether the reader of stdout has gone.
  static var isClosed: Bool {
    var item = pollfd(fd: STDOUT_FILENO, events: 0, revents: 0)
    return poll(&item, 1, 0) > 0 && isEnd(item.revents)
  }

  /// Whether `poll` events of stdout mean that its reader has gone: a pipe reports an error, a
  /// socket or terminal a hang-up, and stdout may be closed.
  static func isEnd(_ events: Int16) -> Bool {
    events & Int16(POLLERR | POLLHUP | POLLNVAL) != 0
  }

  /// Throws if something could not be written. A closed pipe is not a failure, since its reader has
  /// what it wanted; nor is a closed terminal, which gives the writer EIO.
  static func check() throws {
    let error = failure.load(ordering: .relaxed)
    if error == 0 || error == EPIPE || error == EIO && isClosed { return }
    printError("mooncake: writing to stdout: \(Errno(error))")
    throw ExitCode(1)
  }
}

/// Prints a line on stdout.
func printLine(_ text: String) { Output.write(text + "\n") }

/// Prints a line on stderr.
func printError(_ text: String) {
  fflush(nil)
  var line = text + "\n"
  _ = line.withUTF8 { write(STDERR_FILENO, $0.baseAddress, $0.count) }
}

/// Silences the library's log unless the environment sets a level: the program itself prints each
/// failure in the same words.
func silenceLog() {
  if getenv("MC_LOG_LEVEL") == nil { Log.setLevel(.off) }
}

/// Turns an engine's error into the program's: prints the message and exits with 1.
func reportingErrors<Result>(_ body: () throws -> Result) throws -> Result {
  do {
    return try body()
  } catch let error as MooncakeError {
    printError("mooncake: \(error.message)")
    throw ExitCode(1)
  }
}

/// Rows of text whose columns line up; the first column is left-aligned, the others right-aligned.
struct TextTable {
  private let widths: [Int]

  /// Each column is at least as wide as its title and as `minimum`.
  init(titles: [String], minimum: [Int]) {
    widths = zip(titles, minimum).map { Swift.max($0.count, $1) }
  }

  func line(_ cells: [String]) -> String {
    var text = ""
    for (index, (cell, width)) in zip(cells, widths).enumerated() {
      let padding = String(repeating: " ", count: Swift.max(0, width - cell.count))
      text += index == 0 ? cell + padding : "  " + padding + cell
    }
    return text
  }
}
