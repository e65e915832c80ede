import MooncakeBase
import Testing

struct JSONTests {
  private func unsigned(_ text: String) throws -> UInt64? {
    try JSONDocument(parsing: "{\"a\":\(text)}").read { $0["a"]?.unsigned }
  }

  @Test(
    arguments: [
      ("0", 0), ("-0", 0), ("1", 1), ("999999999999999", 999_999_999_999_999),
      ("1000000000000000", 1_000_000_000_000_000),
      ("9007199254740993", 9_007_199_254_740_993),
      ("139637976793088", 139_637_976_793_088),
      ("18446744073709551615", .max), ("1.0", 1), ("1e3", 1000),
    ] as [(String, UInt64)])
  func exactIntegers(text: String, value: UInt64) throws {
    #expect(try unsigned(text) == value)
  }

  @Test(arguments: [
    "-1", "1.5", "1e-1", "18446744073709551616", "1e19", "1e400", "9007199254740993.0", "null",
    "true", "\"1\"", "[1]", "{}", "-9007199254740993", "99999999999999999999999999999999999999",
    "\"9007199254740993\"", "1.00000000000000000000000000000000000000000000000000000000000000001",
  ])
  func noInteger(text: String) throws {
    #expect(try unsigned(text) == nil)
  }

  @Test(arguments: [
    "", " ", "{", "}", "[", "]", "{]", "[}", "{\"a\"", "{\"a\":", "{\"a\":1", "{\"a\":1,",
    "{\"1\":1,",
    "{\"a\" 1}", "{a:1}", "[1,]", "[,1]", "\"", "\"a", "\"\\", "\"\\\"", "\"\\u12", "\"\\uD800\"",
    "\"\\x\"", "01", "1.", "-", "+1", ".5", "1e", "1e+", "0x10", "nul", "nulll", "truefalse", "1 2",
    "{}{}", "[1]x", "\u{FEFF}{}", "\"a\u{1}b\"", "\"\\u0000\"", "'a'", "NaN", "Infinity", "//",
    "{\"a\":1}\u{0}", "\u{0}{}", "{\"a\u{0}\":1}", "12345678901234567x", "\"a\"12345678901234567",
  ])
  func rejects(text: String) {
    #expect(throws: JSONError.self) { _ = try JSONDocument(parsing: text) }
  }

  @Test func rejectsInvalidUTF8() {
    let bad: [[UInt8]] = [
      [0x22, 0xFF, 0x22], [0x22, 0xC0, 0x80, 0x22], [0x22, 0xED, 0xA0, 0x80, 0x22],
      [0x22, 0xE2, 0x82],
      [0x22, 0xF5, 0x80, 0x80, 0x80, 0x22], [0x80], [0x22, 0xFF, 0x31, 0x22],
    ]
    for bytes in bad {
      #expect(throws: JSONError.self, "\(bytes)") { _ = try JSONDocument(parsing: bytes) }
    }
  }

  @Test func depthIsBounded() throws {
    let limit = JSONText.maximumDepth
    let deepest = String(repeating: "[", count: limit) + String(repeating: "]", count: limit)
    _ = try JSONDocument(parsing: deepest)
    for depth in [limit + 1, 1000, 1001, 1_000_000] {
      for open in ["[", "{\"a\":"] {
        #expect(throws: JSONError.self) {
          _ = try JSONDocument(parsing: String(repeating: open, count: depth))
        }
      }
    }
  }

  @Test func numberOfValuesIsBoundedByTheSize() throws {
    let dense = "[" + String(repeating: "0,", count: 500_000) + "0]"
    #expect(throws: JSONError.self) { _ = try JSONDocument(parsing: dense) }
    let sparse = "[" + String(repeating: "12345,", count: 100_000) + "0]"
    #expect(try JSONDocument(parsing: sparse).read { Array($0.elements).count } == 100_001)
  }

  @Test func stringsKeepEscapesAndUnicode() throws {
    let text = try JSONDocument(parsing: #"{"a":"x\"\\\/\n\té\u00e9\ud83d\ude00"}"#)
      .read { $0["a"]?.string }
    #expect(text == "x\"\\/\n\téé😀")
  }

  @Test func firstOfDuplicateMembersCounts() throws {
    #expect(try JSONDocument(parsing: #"{"a":1,"a":2}"#).read { $0["a"]?.unsigned } == 1)
  }

  @Test func lookupsInOtherValuesFindNothing() throws {
    for text in ["[1]", "1", "\"a\"", "null", "true"] {
      #expect(try JSONDocument(parsing: text).read { $0["a"] == nil })
    }
    #expect(try JSONDocument(parsing: #"{"A":1}"#).read { $0["a"] == nil })
  }

  @Test func writerOutputParsesBack() throws {
    let name = "q\"b\\n\n\u{1F}\u{8}é😀"
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("name", name)
    writer.member("big", UInt64.max)
    writer.name("list")
    writer.beginArray()
    writer.value(1)
    writer.value("two")
    writer.beginObject()
    writer.endObject()
    writer.endArray()
    writer.endObject()
    try JSONDocument(parsing: writer.text).read { root in
      #expect(root["name"]?.string == name)
      #expect(root["big"]?.unsigned == .max)
      #expect(root["list"].map { Array($0.elements).count } == 3)
    }
  }
}
