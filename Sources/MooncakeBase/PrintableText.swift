/// Makes untrusted text safe for a line of a log or a terminal.
package enum PrintableText {
  /// The text with unprintable characters escaped, cut to at most `limit` bytes.
  package static func make(_ text: String, limit: Int = 4000) -> String {
    var text = text
    let isPlain = text.withUTF8 { bytes in
      bytes.count <= limit && bytes.allSatisfy { $0 >= 0x20 && $0 < 0x7F }
    }
    return isPlain ? text : escaped(text, limit)
  }

  private static func escaped(_ text: String, _ limit: Int) -> String {
    let mark = "..."
    var result = ""
    var room = limit - mark.utf8.count
    for scalar in text.unicodeScalars {
      let piece = isPrintable(scalar) ? String(scalar) : code(scalar)
      if piece.utf8.count > room { return result + mark }
      room -= piece.utf8.count
      result += piece
    }
    return result
  }

  private static func code(_ scalar: Unicode.Scalar) -> String {
    switch scalar {
    case "\n": "\\n"
    case "\r": "\\r"
    case "\t": "\\t"
    default: "\\u{" + String(scalar.value, radix: 16) + "}"
    }
  }

  /// False for control characters, line breaks and characters that change the writing direction.
  private static func isPrintable(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.value {
    case 0..<0x20, 0x7F..<0xA0, 0x061C, 0x200B...0x200F, 0x2028...0x202E, 0x2060...0x206F, 0xFEFF:
      false
    default: true
    }
  }
}
