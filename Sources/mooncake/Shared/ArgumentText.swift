import ArgumentParser
import Glibc
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// Arguments as text without losing bytes: each byte that is not UTF-8 becomes a private-use
/// character, and so does each byte of such a character in the input. Only paths accept them.
enum ArgumentText {
  /// Characters that stand for bytes: a private-use block without known users.
  private static let block: ClosedRange<UInt32> = 0x10FF00...0x10FFFF
  /// Arguments that were parsed as paths.
  private static let paths = Lock<Set<String>>([])

  /// The arguments of this process without its name.
  static func ofProcess() -> [String] {
    (1..<max(1, Int(CommandLine.argc))).compactMap { index in
      CommandLine.unsafeArgv[index].map { text in
        encoded(Array(UnsafeRawBufferPointer(start: text, count: strlen(text))))
      }
    }
  }

  /// Overwrites the secrets of URIs that `ps` shows. Until now everybody could read them, so an
  /// environment variable is better.
  static func hideSecretsOfProcess() {
    for index in 1..<max(1, Int(CommandLine.argc)) {
      guard let text = CommandLine.unsafeArgv[index] else { continue }
      let bytes = UnsafeMutableRawBufferPointer(start: text, count: strlen(text))
      let argument = String(decoding: bytes, as: UTF8.self)
      let hidden = hidingSecrets(of: [argument], in: argument)
      if hidden == argument { continue }
      let shown = Array(hidden.utf8)
      let start = zip(shown, bytes).prefix { $0 == $1 }.count
      let left = min(shown.count, bytes.count) - start
      let end = zip(shown.reversed(), bytes.reversed()).prefix(left).prefix { $0 == $1 }.count
      for position in start..<(bytes.count - end) { bytes[position] = UInt8(ascii: "*") }
    }
  }

  static func encoded(_ bytes: [UInt8]) -> String {
    if let text = String(validating: bytes, as: UTF8.self), !standsForBytes(text) { return text }
    var result = String.UnicodeScalarView()
    func escape(_ byte: UInt8) {
      result.append(Unicode.Scalar(block.lowerBound + UInt32(byte))!)
    }
    var parser = UTF8.ForwardParser()
    var input = bytes.makeIterator()
    var position = 0
    while true {
      switch parser.parseScalar(from: &input) {
      case .valid(let units):
        let scalar = UTF8.decode(units)
        if block.contains(scalar.value) {
          for unit in units { escape(unit) }
        } else {
          result.append(scalar)
        }
        position += units.count
      case .error(let length):
        for byte in bytes[position..<position + length] { escape(byte) }
        position += length
      case .emptyInput: return String(result)
      }
    }
  }

  /// The bytes that a text was made from.
  static func decoded(_ text: String) -> [UInt8] {
    var bytes: [UInt8] = []
    for scalar in text.unicodeScalars {
      if block.contains(scalar.value) {
        bytes.append(UInt8(scalar.value - block.lowerBound))
      } else {
        bytes += UTF8.encode(scalar)!
      }
    }
    return bytes
  }

  private static func standsForBytes(_ text: String) -> Bool {
    text.unicodeScalars.contains { block.contains($0.value) }
  }

  /// A message that may quote arguments, with the secrets of URIs hidden.
  static func hidingSecrets(of arguments: [String], in message: String) -> String {
    var shown = message
    for argument in arguments {
      let value = argument.hasPrefix("-") ? argument.drop { $0 != "=" }.dropFirst() : argument[...]
      guard value.contains("://") || value.contains("@") else { continue }
      shown = shown.split(separator: value, omittingEmptySubsequences: false)
        .joined(separator: RedactedURI.text(String(value)))
    }
    return shown
  }

  /// Parses an argument as a path.
  static func path(_ text: String) -> FilePath {
    if standsForBytes(text) { paths.withLock { _ = $0.insert(text) } }
    return FilePath(bytes: decoded(text))
  }

  /// Refuses arguments that are not UTF-8, except for paths.
  static func refuseNames(in arguments: [String]) throws {
    let paths = paths.withLock { $0 }
    for argument in arguments where standsForBytes(argument) {
      let isPath = paths.contains { argument == $0 || argument.hasSuffix("=" + $0) }
      let bytes = decoded(argument)
      if isPath || String(validating: bytes, as: UTF8.self) != nil { continue }
      throw ValidationError(
        "The argument '\(String(decoding: bytes, as: UTF8.self))' is not UTF-8; only the paths of "
          + "`mooncake store` may be other bytes.")
    }
  }
}

extension FilePath: ExpressibleByArgument {
  public init?(argument: String) { self = ArgumentText.path(argument) }
}
