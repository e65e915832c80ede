import ArgumentParser
import Glibc
import MooncakeEngine

/// Prints a line on stdout at once, also into a pipe.
func printLine(_ text: String) {
  print(text)
  fflush(nil)
}

/// Prints a line on stderr.
func printError(_ text: String) {
  fflush(nil)
  var line = text + "\n"
  _ = line.withUTF8 { write(STDERR_FILENO, $0.baseAddress, $0.count) }
}

/// Silences the library's log unless the environment asks for it: the program prints each failure
/// itself, in the same words.
func silenceLog() {
  if getenv("MC_LOG_LEVEL") == nil { Log.setLevel(.off) }
}

/// Turns an engine's error into the program's: the message, then exit code 1.
func reportingEngineErrors<Result>(_ body: () throws -> Result) throws -> Result {
  do {
    return try body()
  } catch let error as EngineError {
    printError("mooncake: \(error.message)")
    throw ExitCode(1)
  }
}

/// Rows of text whose columns line up; the first column is left-aligned, the others right-aligned.
struct TextTable {
  private let widths: [Int]

  /// Each column is as wide as its title, or as `minimum` says.
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
