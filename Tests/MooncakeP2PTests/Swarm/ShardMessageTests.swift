import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import Testing

@Suite struct ShardMessageTests {
  private let peer = HolderAddress(holding: 0xFEDC_BA98_7654_3210, rpc: "h:1", segment: "a\"b")

  private func parseRequest(_ text: String) throws -> ShardRequest {
    try JSONDocument(parsing: text).read { value throws(MooncakeError) in
      try ShardRequest(json: value, shardCount: 77)
    }
  }

  private func parseAnswer(_ text: String) throws -> ShardAnswer {
    try ShardAnswer(json: text, shardCount: 77)
  }

  @Test func requestsComeBack() throws {
    var have = ShardSet(count: 77)
    for shard in [0, 63, 76] { have.insert(shard) }
    var request = ShardRequest(
      holding: .max, version: PayloadVersion(high: 1, low: .max), reader: 5, own: peer,
      have: have, wanted: 3..<77, turn: .max, reading: [0, 76], limit: 64)
    #expect(try parseRequest(request.json) == request)
    request.own = nil
    request.wanted = nil
    request.have = ShardSet(count: 77)
    request.reading = []
    #expect(try parseRequest(request.json) == request)
    #expect(request.json.contains(#""service":"store","op":"ask","holding":"ffffffffffffffff""#))
  }

  @Test func answersComeBack() throws {
    let answer = ShardAnswer(
      state: .serving, granted: [0, 76], leaseMilliseconds: 10_000, retryMilliseconds: 20,
      heldCount: 77, readerCount: 4, peers: [peer, peer])
    #expect(try parseAnswer(answer.json) == answer)
    #expect(try parseAnswer(ShardAnswer(state: .gone).json) == ShardAnswer(state: .gone))
  }

  @Test(arguments: [
    (#""reader":"0000000000000005""#, #""reader":"5""#),
    (#""reader":"0000000000000005""#, #""reader":5"#),
    (#""reader":"0000000000000005""#, #""reader":"+000000000000005""#),
    (#""version":"00000000000000010000000000000002""#, #""version":"x""#),
    (#""version":"00000000000000010000000000000002""#, #""version":null"#),
    (#""limit":2"#, #""limit":-2"#),
    (#""limit":2"#, #""limit":1025"#),
    (#""limit":2"#, #""limit":18446744073709551616"#),
    (#""limit":2"#, #""limit":1.5"#),
    (#""limit":2"#, #""limit":2,"reading":[77]"#),
    (#""limit":2"#, #""limit":2,"reading":7"#),
    (#""limit":2"#, #""limit":2,"reading":["1"]"#),
    (#""turn":9"#, #""turn":-9"#),
    (#""turn":9"#, #""turn":"9""#),
    (#""limit":2"#, #""limit":2,"have":"AAAA""#),
    (#""limit":2"#, #""limit":2,"have":"?""#),
    (#""limit":2"#, #""limit":2,"have":"/////////////w==""#),
    (#""limit":2"#, #""limit":2,"from":1"#),
    (#""limit":2"#, #""limit":2,"from":5,"to":4"#),
    (#""limit":2"#, #""limit":2,"from":0,"to":78"#),
    (#""limit":2"#, #""limit":2,"own":{}"#),
    (#""limit":2"#, #""limit":2,"own":{"holding":"0000000000000005","rpc":"","segment":"s"}"#),
  ])
  func malformedRequests(part: String, replacement: String) throws {
    let request = ShardRequest(
      holding: 1, version: PayloadVersion(high: 1, low: 2), reader: 5, own: nil,
      have: ShardSet(count: 77), turn: 9, reading: [], limit: 2)
    let parts = split(request.json, at: part)
    #expect(parts != nil, "the part must be there")
    guard let parts else { return }
    let error = #expect(throws: MooncakeError.self) {
      try parseRequest(parts.0 + replacement + parts.1)
    }
    #expect(error?.code == .protocolViolation)
  }

  @Test(arguments: [
    "", "[]", "null", "{}", #"{"state":3}"#, #"{"state":0}"#, "{\"state\":0",
    #"{"state":0,"granted":[77],"lease_ms":1,"retry_ms":0,"held":0,"readers":0}"#,
    #"{"state":0,"granted":{},"lease_ms":1,"retry_ms":0,"held":0,"readers":0}"#,
    #"{"state":0,"lease_ms":99999999999999,"retry_ms":0,"held":0,"readers":0}"#,
    #"{"state":0,"lease_ms":1,"retry_ms":0,"held":78,"readers":0}"#,
    #"{"state":0,"lease_ms":1,"retry_ms":0,"held":7,"readers":0,"peers":[1]}"#,
    #"{"state":0,"lease_ms":1,"retry_ms":0,"held":7,"readers":0,"peers":"x"}"#,
  ])
  func malformedAnswers(text: String) {
    let error = #expect(throws: MooncakeError.self) { try parseAnswer(text) }
    #expect(error?.code == .protocolViolation)
  }

  @Test func tooMuchIsRefused() {
    let many = ShardAnswer(state: .serving, peers: Array(repeating: peer, count: 17))
    #expect(throws: MooncakeError.self) { try parseAnswer(many.json) }
    let granted = ShardAnswer(state: .serving, granted: Array(repeating: 1, count: 1025))
    #expect(throws: MooncakeError.self) { try parseAnswer(granted.json) }
    let name = String(repeating: "x", count: 1025)
    let long = ShardAnswer(
      state: .serving, peers: [HolderAddress(holding: 1, rpc: name, segment: "s")])
    #expect(throws: MooncakeError.self) { try parseAnswer(long.json) }
  }

  private func split(_ text: String, at part: String) -> (String, String)? {
    let bytes = Array(text.utf8)
    let wanted = Array(part.utf8)
    guard bytes.count >= wanted.count else { return nil }
    for start in 0...(bytes.count - wanted.count)
    where bytes[start..<(start + wanted.count)].elementsEqual(wanted) {
      return (
        String(decoding: bytes[..<start], as: UTF8.self),
        String(decoding: bytes[(start + wanted.count)...], as: UTF8.self)
      )
    }
    return nil
  }
}
