/// Builds one line of JSON in the order in which members are added.
struct JSONObject {
  private var members: [String] = []

  mutating func add(_ key: String, _ value: String) {
    addRaw(key, Self.quoted(value))
  }

  mutating func add(_ key: String, _ value: UInt64) { addRaw(key, String(value)) }

  mutating func add(_ key: String, _ value: Int) { addRaw(key, String(value)) }

  mutating func add(_ key: String, _ value: Bool) { addRaw(key, value ? "true" : "false") }

  mutating func add(_ key: String, _ value: Double, places: Int) {
    addRaw(key, decimal(value, places: places))
  }

  mutating func add(_ key: String, _ value: JSONObject) { addRaw(key, value.text) }

  mutating func add(_ key: String, _ values: [JSONObject]) {
    addRaw(key, "[" + values.map(\.text).joined(separator: ",") + "]")
  }

  mutating func add(_ key: String, _ values: [String]) {
    addRaw(key, "[" + values.map(Self.quoted).joined(separator: ",") + "]")
  }

  mutating func add(_ key: String, _ values: [UInt64]) {
    addRaw(key, "[" + values.map { String($0) }.joined(separator: ",") + "]")
  }

  var text: String { "{" + members.joined(separator: ",") + "}" }

  private mutating func addRaw(_ key: String, _ value: String) {
    members.append(Self.quoted(key) + ":" + value)
  }

  private static func quoted(_ text: String) -> String {
    var result = "\""
    for scalar in text.unicodeScalars {
      switch scalar {
      case "\"": result += "\\\""
      case "\\": result += "\\\\"
      case "\n": result += "\\n"
      case "\r": result += "\\r"
      case "\t": result += "\\t"
      case let control where control.value < 0x20 || control.value == 0x7F:
        let digits = String(control.value, radix: 16)
        result += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
      default: result.unicodeScalars.append(scalar)
      }
    }
    return result + "\""
  }
}
