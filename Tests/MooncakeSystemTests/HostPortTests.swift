import MooncakeSystem
import Testing

struct HostPortTests {
  @Test(
    arguments: [
      ("10.0.0.5", "10.0.0.5", nil),
      ("10.0.0.5:15321", "10.0.0.5", 15321),
      ("node-7.example", "node-7.example", nil),
      ("node-7.example:1", "node-7.example", 1),
      ("host:0", "host", 0),
      ("host:65535", "host", 65535),
      ("host:00080", "host", 80),
      ("::", "::", nil),
      ("::1", "::1", nil),
      ("[::1]", "::1", nil),
      ("[::1]:80", "::1", 80),
      ("fe80::1:1200", "fe80::1:1200", nil),
      ("fe80::1:12001", "fe80::1", 12001),
      ("1:2:3:4:5:6:7:8:9000", "1:2:3:4:5:6:7:8", 9000),
      ("::ffff:10.0.0.5", "::ffff:10.0.0.5", nil),
      ("[::ffff:10.0.0.5]:7", "::ffff:10.0.0.5", 7),
      ("fe80::1%eth0", "fe80::1%eth0", nil),
      ("fe80::1%eth0:12001", "fe80::1%eth0", 12001),
      ("fe80::1%eth0:1:12001", "fe80::1%eth0:1", 12001),
      ("[fe80::1%eth0]:12001", "fe80::1%eth0", 12001),
      ("müller.example:7", "müller.example", 7),
    ] as [(String, String, UInt16?)])
  func accepts(text: String, host: String, port: UInt16?) throws {
    #expect(try HostPort(parsing: text) == HostPort(host: host, port: port))
  }

  @Test(arguments: [
    "", ":", ":80", "host:", "host:x", "host:65536", "host:-1", "host:+1", "host: 1", "host:1 ",
    "host:99999999999999999999", "ho st:1", "host\n:1", "host\u{0}:1", "host\u{7F}", "\t", "[",
    "[]",
    "[]:1", "[::1", "[::1]80", "[::1]x:80", "[::1]:", "[::1]:65536", "[host]:80", "[10.0.0.5]:80",
    "[fe80::1%]:80", "fe80::1%", "fe80::1%:80", "fe80::1%eth0:", "a:b:80", "::1]:80", "ho[st:80",
    "[[::1]]:80", "fe80::1%[a]", "[fe80::1%[a]:1", "fe80::1%a]:80", "host:８０",
  ])
  func rejects(text: String) {
    #expect(throws: HostPortError.self) { try HostPort(parsing: text) }
  }

  @Test func lengthIsBounded() throws {
    let longest = String(repeating: "a", count: HostPort.maximumBytes)
    #expect(try HostPort(parsing: longest).host == longest)
    #expect(throws: HostPortError.self) { try HostPort(parsing: longest + "a") }
  }

  @Test(
    arguments: [
      ("host", 12001), ("host:", 12001), ("host:x", 12001), ("host:70000", 12001), ("host:7", 7),
      ("[::1]", 12001), ("[::1]:x", 12001), ("[::1]:7", 7), ("fe80::1%eth0:x", 12001),
    ] as [(String, UInt16)])
  func lenientPort(text: String, port: UInt16) throws {
    let parsed = try HostPort(parsing: text, defaultPort: 12001)
    #expect(parsed.port == port)
    #expect(!parsed.host.contains("x"))
  }

  @Test func lenientHostIsStillChecked() {
    for text in ["", ":7", "a b", "[x]:7"] {
      #expect(throws: HostPortError.self) { try HostPort(parsing: text, defaultPort: 1) }
    }
  }

  @Test(arguments: [
    "10.0.0.5:1", "10.0.0.5", "[::1]:80", "[::1]", "[fe80::1%eth0]:12001", "node:65535",
  ])
  func descriptionParsesBack(text: String) throws {
    let parsed = try HostPort(parsing: text)
    #expect(parsed.description == text)
    #expect(try HostPort(parsing: parsed.description) == parsed)
  }

  /// Random texts from the interesting characters: no trap, and what is accepted survives a round
  /// trip.
  @Test func randomTexts() {
    var random = Generator(state: 20_261_124)
    let alphabet = Array("[]:%.0129afgz \u{0}é")
    for _ in 0..<50_000 {
      let length = Int.random(in: 0...12, using: &random)
      let text = String((0..<length).map { _ in alphabet.randomElement(using: &random)! })
      guard let parsed = try? HostPort(parsing: text) else { continue }
      #expect(!parsed.host.isEmpty)
      #expect((try? HostPort(parsing: parsed.description)) == parsed, "\(text)")
    }
  }
}

/// The same numbers in every run.
private struct Generator: RandomNumberGenerator {
  var state: UInt64

  mutating func next() -> UInt64 {
    state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
    return state ^ (state >> 29)
  }
}
