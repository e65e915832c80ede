import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import Testing

@Suite struct HolderRecordTests {
  @Test func namesThatCouldBeKeys() throws {
    for name in ["a", "ckpt/step 1", "é", String(repeating: "x", count: 512)] {
      try PayloadName.check(name)
    }
    for name in ["", "/a", "a\n", "\u{7F}", "a\0b", String(repeating: "x", count: 513)] {
      #expect(throws: MooncakeError.self) { try PayloadName.check(name) }
    }
  }

  @Test func textAndBack() throws {
    let record = testRecord("a \"quoted\"/é", holding: .max, isOrigin: false, isComplete: false)
    #expect(try HolderRecord(json: record.json) == record)
    let head = PayloadHead(record.summary, origin: record.holder)
    #expect(try PayloadHead(json: head.json) == head)
    #expect(HolderRecord(origin: head).isComplete)
  }

  @Test func whatIsNoRecordIsRefused() {
    let good = testRecord("a", holding: 1).json
    func with(_ old: String, _ new: String) -> String {
      let parts = good.split(separator: old, omittingEmptySubsequences: false)
      #expect(parts.count == 2)
      return parts.joined(separator: new)
    }
    let texts = [
      "", "{", "null", "[]", "7", "{}", good + "x", String(good.dropLast()),
      with("\"name\":\"a\"", "\"name\":\"\""), with("\"name\":\"a\"", "\"name\":\"/a\""),
      with("\"name\":\"a\"", "\"name\":7"), with("\"size\":100", "\"size\":129"),
      with("\"size\":100", "\"size\":-1"), with("\"size\":100", "\"size\":1e300"),
      with("\"size\":100", "\"size\":18446744073709551616"),
      with("\"shards\":2", "\"shards\":1048577"), with("\"shards\":2", "\"shards\":[]"),
      with("\"buffers\":1", "\"buffers\":65537"),
      with("\"shard_bytes\":64", "\"shard_bytes\":18446744073709551615"),
      with("\"holding\":\"0000000000000001\"", "\"holding\":\"1\""),
      with("\"holding\":\"0000000000000001\"", "\"holding\":\"+000000000000001\""),
      with("\"rpc\":\"10.0.0.1:7\"", "\"rpc\":\"\""),
      with(
        "\"rpc\":\"10.0.0.1:7\"", "\"rpc\":\"\(String(repeating: "x", count: 2000))\""),
      String(repeating: "[", count: 100_000),
    ]
    for text in texts {
      #expect(code { _ = try HolderRecord(json: text) } == .protocolViolation, "\(text.prefix(90))")
    }
  }
}
