/// 64-bit numbers as text of sixteen hexadecimal digits.
package enum HexNumber {
  package static func text(_ number: UInt64) -> String {
    let digits = String(number, radix: 16)
    return String(repeating: "0", count: 16 - digits.utf8.count) + digits
  }

  /// nil unless the text is sixteen hexadecimal digits.
  package static func parse(_ text: String) -> UInt64? {
    guard text.utf8.count == 16,
      !text.utf8.contains(where: { $0 == UInt8(ascii: "+") || $0 == UInt8(ascii: "-") })
    else { return nil }
    return UInt64(text, radix: 16)
  }
}
