import Glibc

/// Options of the form `--name value`, and everything else.
public struct Arguments {
  public private(set) var plain: [String] = []
  private var options: [String: String] = [:]

  /// Splits the program's arguments; `known` lists its options.
  public init(known: Set<String>) throws(ExampleError) {
    var rest = CommandLine.arguments.dropFirst()
    while let word = rest.popFirst() {
      guard word.hasPrefix("--") else {
        plain.append(word)
        continue
      }
      guard known.contains(word) else { throw ExampleError("unknown option \(word)") }
      guard let value = rest.popFirst() else { throw ExampleError("\(word) needs a value") }
      options[word] = value
    }
  }

  public subscript(name: String) -> String? { options[name] }
}

/// Prints a failure and ends the program.
public func exitWithFailure(_ program: String, _ error: any Error) -> Never {
  fflush(nil)
  var line = "\(program): \(error)\n"
  _ = line.withUTF8 { write(STDERR_FILENO, $0.baseAddress, $0.count) }
  exit(1)
}
