/// Base64 with padding, for bytes in JSON.
package enum Base64 {
  private static let alphabet = Array(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".utf8)
  /// 64 marks bytes that are not digits.
  private static let values: [UInt8] = {
    var values = [UInt8](repeating: 64, count: 256)
    for (value, digit) in alphabet.enumerated() { values[Int(digit)] = UInt8(value) }
    return values
  }()

  static func prepare() { _ = values }

  package static func encode(_ bytes: some Collection<UInt8>) -> String {
    var output: [UInt8] = []
    output.reserveCapacity((bytes.count + 2) / 3 * 4)
    var iterator = bytes.makeIterator()
    while let first = iterator.next() {
      let second = iterator.next()
      let third = second == nil ? nil : iterator.next()
      let group = UInt32(first) << 16 | UInt32(second ?? 0) << 8 | UInt32(third ?? 0)
      output.append(alphabet[Int(group >> 18)])
      output.append(alphabet[Int(group >> 12 & 63)])
      output.append(second == nil ? UInt8(ascii: "=") : alphabet[Int(group >> 6 & 63)])
      output.append(third == nil ? UInt8(ascii: "=") : alphabet[Int(group & 63)])
    }
    return String(decoding: output, as: UTF8.self)
  }

  /// nil if the text is not Base64.
  package static func decode(_ text: String) -> [UInt8]? {
    let digits = Array(text.utf8)
    if digits.isEmpty { return [] }
    guard digits.count % 4 == 0 else { return nil }
    let padding = digits.suffix(2).reversed().prefix { $0 == UInt8(ascii: "=") }.count
    var output: [UInt8] = []
    output.reserveCapacity(digits.count / 4 * 3)
    var group: UInt32 = 0
    for (index, digit) in digits.dropLast(padding).enumerated() {
      let value = values[Int(digit)]
      if value == 64 { return nil }
      group = group << 6 | UInt32(value)
      if index % 4 == 3 {
        output += [UInt8(group >> 16), UInt8(group >> 8 & 0xFF), UInt8(group & 0xFF)]
        group = 0
      }
    }
    if padding == 1 { output += [UInt8(group >> 10), UInt8(group >> 2 & 0xFF)] }
    if padding == 2 { output.append(UInt8(group >> 4)) }
    return output
  }
}
