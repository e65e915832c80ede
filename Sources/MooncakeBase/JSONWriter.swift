/// Writes compact JSON with exact integers.
package struct JSONWriter {
  private var bytes: [UInt8] = []
  private var needsComma = false

  package init() {}

  /// What has been written.
  package var text: String { String(decoding: bytes, as: UTF8.self) }

  package var byteCount: Int { bytes.count }

  package mutating func reserve(_ byteCount: Int) { bytes.reserveCapacity(byteCount) }

  package mutating func beginObject() { open(UInt8(ascii: "{")) }
  package mutating func endObject() { close(UInt8(ascii: "}")) }
  package mutating func beginArray() { open(UInt8(ascii: "[")) }
  package mutating func endArray() { close(UInt8(ascii: "]")) }

  /// Starts a member of an object; its value comes next.
  package mutating func name(_ name: String) {
    separate()
    quote(name)
    bytes.append(UInt8(ascii: ":"))
    needsComma = false
  }

  package mutating func value(_ text: String) {
    separate()
    quote(text)
    needsComma = true
  }

  package mutating func value(_ number: UInt64) {
    separate()
    bytes.append(contentsOf: String(number).utf8)
    needsComma = true
  }

  package mutating func value(_ truth: Bool) {
    separate()
    bytes.append(contentsOf: (truth ? "true" : "false").utf8)
    needsComma = true
  }

  /// A member with a string.
  package mutating func member(_ name: String, _ text: String) {
    self.name(name)
    value(text)
  }

  /// A member with an integer.
  package mutating func member(_ name: String, _ number: UInt64) {
    self.name(name)
    value(number)
  }

  private mutating func separate() {
    if needsComma { bytes.append(UInt8(ascii: ",")) }
  }

  private mutating func open(_ bracket: UInt8) {
    separate()
    bytes.append(bracket)
    needsComma = false
  }

  private mutating func close(_ bracket: UInt8) {
    bytes.append(bracket)
    needsComma = true
  }

  private mutating func quote(_ text: String) {
    bytes.append(UInt8(ascii: "\""))
    defer { bytes.append(UInt8(ascii: "\"")) }
    // Segment names, by far the most frequent strings, need no escapes.
    if !text.utf8.contains(where: Self.needsEscape) {
      bytes.append(contentsOf: text.utf8)
      return
    }
    for byte in text.utf8 {
      switch byte {
      case UInt8(ascii: "\""), UInt8(ascii: "\\"):
        bytes.append(UInt8(ascii: "\\"))
        bytes.append(byte)
      case 0..<0x20:
        bytes.append(contentsOf: byte < 0x10 ? "\\u000".utf8 : "\\u001".utf8)
        bytes.append(contentsOf: String(byte & 0xF, radix: 16).utf8)
      default: bytes.append(byte)
      }
    }
  }

  private static func needsEscape(_ byte: UInt8) -> Bool {
    byte < 0x20 || byte == UInt8(ascii: "\"") || byte == UInt8(ascii: "\\")
  }
}
