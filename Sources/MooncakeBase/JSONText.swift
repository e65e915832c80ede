/// Checks and prepares a text for cJSON in one pass.
///
/// cJSON keeps numbers as doubles, which would round addresses above 2^53. So long numbers are
/// passed to it as strings that begin with a byte which never occurs in UTF-8; that tells them from
/// real strings, and they are read back digit by digit.
package enum JSONText {
  /// Levels of arrays and objects.
  package static let maximumDepth = 64
  /// Values a text may have beyond one per four bytes. Bounds cJSON's allocations to about thirty
  /// bytes per byte received.
  package static let freeValueCount = 4096
  /// Longer numbers become marked strings; every integer up to here is exact as a double.
  static let maximumPlainDigits = 15
  static let numberMark: UInt8 = 0xFF

  /// The text prepared for cJSON, terminated by a NUL.
  static func prepared(_ bytes: UnsafeRawBufferPointer) throws(JSONError) -> [UInt8] {
    if !isUTF8(bytes) { throw JSONError(description: "the text is not UTF-8") }
    var scanner = Scanner(bytes: bytes)
    try scanner.scan()
    return scanner.output
  }

  static func isSpace(_ byte: UInt8) -> Bool {
    byte == 0x20 || byte == 0x0A || byte == 0x0D || byte == 0x09
  }

  private static func isUTF8(_ bytes: UnsafeRawBufferPointer) -> Bool {
    bytes.withMemoryRebound(to: UInt8.self) { (try? UTF8Span(validating: $0.span)) != nil }
  }
}

private struct Scanner {
  let bytes: UnsafeRawBufferPointer
  var output: [UInt8] = []
  private var position = 0
  private var depth = 0
  private var valueCount = 1

  init(bytes: UnsafeRawBufferPointer) { self.bytes = bytes }

  mutating func scan() throws(JSONError) {
    output.reserveCapacity(bytes.count + bytes.count / 8 + 16)
    let valueLimit = bytes.count / 4 + JSONText.freeValueCount
    while position < bytes.count {
      let byte = bytes[position]
      switch byte {
      case UInt8(ascii: "\""):
        try copyString()
        continue
      case UInt8(ascii: "-"), UInt8(ascii: "0")...UInt8(ascii: "9"):
        try copyNumber()
        continue
      case UInt8(ascii: "["), UInt8(ascii: "{"):
        depth += 1
        valueCount += 1
        if depth > JSONText.maximumDepth { throw error("nested too deeply") }
      case UInt8(ascii: "]"), UInt8(ascii: "}"): depth -= 1
      case UInt8(ascii: ","):
        valueCount += 1
        if valueCount > valueLimit { throw error("too many values for its size") }
      case UInt8(ascii: ":"), UInt8(ascii: "a")...UInt8(ascii: "z"): break
      default: if !JSONText.isSpace(byte) { throw error("an unexpected byte") }
      }
      output.append(byte)
      position += 1
    }
    output.append(0)
  }

  private mutating func copyString() throws(JSONError) {
    let start = position
    position += 1
    while position < bytes.count {
      let byte = bytes[position]
      position += 1
      if byte == UInt8(ascii: "\"") {
        output.append(contentsOf: bytes[start..<position])
        return
      }
      if byte < 0x20 { throw error("a control character in a string") }
      if byte == UInt8(ascii: "\\") {
        if escapesNUL() { throw error("a NUL character in a string") }
        // An escaped character never ends the string; cJSON checks whether the escape is valid.
        position += 1
      }
    }
    throw error("a string without end")
  }

  /// C strings end at a NUL, so one inside would silently truncate the text.
  private func escapesNUL() -> Bool {
    position + 5 <= bytes.count && bytes[position] == UInt8(ascii: "u")
      && bytes[(position + 1)..<(position + 5)].allSatisfy { $0 == UInt8(ascii: "0") }
  }

  private mutating func copyNumber() throws(JSONError) {
    let start = position
    if bytes[position] == UInt8(ascii: "-") { position += 1 }
    let integer = try skipDigits()
    if integer > 1 && bytes[position - integer] == UInt8(ascii: "0") {
      throw error("a number with a leading zero")
    }
    if peek() == UInt8(ascii: ".") {
      position += 1
      _ = try skipDigits()
    }
    if let next = peek(), next == UInt8(ascii: "e") || next == UInt8(ascii: "E") {
      position += 1
      if let sign = peek(), sign == UInt8(ascii: "+") || sign == UInt8(ascii: "-") {
        position += 1
      }
      _ = try skipDigits()
    }
    let isPlain = position - start <= JSONText.maximumPlainDigits
    if !isPlain { output.append(contentsOf: [UInt8(ascii: "\""), JSONText.numberMark]) }
    output.append(contentsOf: bytes[start..<position])
    if !isPlain { output.append(UInt8(ascii: "\"")) }
  }

  private mutating func skipDigits() throws(JSONError) -> Int {
    let start = position
    while let byte = peek(), (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte) {
      position += 1
    }
    if position == start { throw error("a malformed number") }
    return position - start
  }

  private func peek() -> UInt8? { position < bytes.count ? bytes[position] : nil }

  private func error(_ what: String) -> JSONError {
    JSONError(description: "\(what) near byte \(position)")
  }
}
