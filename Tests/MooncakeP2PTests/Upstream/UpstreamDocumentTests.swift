import MooncakeEngine
import MooncakeP2P
import Testing

@Suite struct UpstreamDocumentTests {
  /// As Mooncake writes it, with `null` for an empty list.
  static let foreign = """
    {"name":"ckpt/a","size":201326592,"size_list":[201326592],"max_shard_size":134217728,\
    "shards":[{"size":134217728,"gold":[{"segment_name":"n1","offset":139637976793088}],\
    "replica_list":null},{"size":67108864,"gold":[{"segment_name":"n1","offset":139638111010816}],\
    "replica_list":[{"segment_name":"n2","offset":140000000000000}]}]}
    """

  @Test func readsTheExistingSystems() throws {
    let document = try UpstreamDocument(json: Self.foreign)
    #expect(document.name == "ckpt/a" && document.size == 201_326_592)
    #expect(document.shards.count == 2 && document.shards[0].replicas.isEmpty)
    #expect(document.shards[1].replicas == [.init(segment: "n2", offset: 140_000_000_000_000)])
    #expect(document.offset(of: 1) == 134_217_728)
    #expect(document.info.version == nil && document.info.holderCount == 2)
    #expect(
      document.holders == [
        PayloadHolder(segment: "n1", version: nil, isOrigin: true, isComplete: true),
        PayloadHolder(segment: "n2", version: nil, isOrigin: false, isComplete: false),
      ])
    #expect(try UpstreamDocument(json: document.json) == document)
  }

  @Test func aDocumentThatIsWrittenAnewIsAnother() throws {
    let document = try UpstreamDocument(json: Self.foreign)
    func with(_ replicas: [String]) -> UpstreamDocument {
      var other = document
      for index in other.shards.indices {
        other.shards[index].replicas = replicas.map { .init(segment: $0, offset: 1 << 40) }
      }
      return other
    }
    let (none, one, two) = (with([]), with(["n3"]), with(["n3", "n4"]))
    // The owner has registered it again, perhaps with other bytes.
    #expect(!none.isContinued(by: none) && !one.isContinued(by: one))
    #expect(!two.isContinued(by: none))
    // Replicas come and go.
    #expect(none.isContinued(by: one) && one.isContinued(by: two) && two.isContinued(by: one))
  }

  @Test func writesWhatTheExistingSystemReads() throws {
    let layout = try ShardLayout(bufferSizes: [100, 10], shardBytes: 64)
    let document = UpstreamDocument(
      name: "w", layout: layout, segment: "n", addresses: [1 << 63, 64, 7])
    let text = """
      {"name":"w","size":110,"size_list":[100,10],"max_shard_size":64,"shards":[\
      {"size":64,"gold":[{"segment_name":"n","offset":9223372036854775808}],"replica_list":[]},\
      {"size":36,"gold":[{"segment_name":"n","offset":64}],"replica_list":[]},\
      {"size":10,"gold":[{"segment_name":"n","offset":7}],"replica_list":[]}]}
      """
    #expect(document.json == text)
  }

  @Test func whatIsNoDocumentIsRefused() {
    func with(_ old: String, _ new: String) -> String {
      let parts = Self.foreign.split(separator: old, omittingEmptySubsequences: false)
      #expect(parts.count > 1)
      return parts.joined(separator: new)
    }
    let texts = [
      "", "{}", "[]", "null", String(Self.foreign.dropLast()),
      with("\"size\":201326592", "\"size\":1"),
      with("\"size\":67108864", "\"size\":67108865"),
      with("\"size_list\":[201326592]", "\"size_list\":[201326592,1]"),
      with("\"size_list\":[201326592]", "\"size_list\":[0]"),
      with("\"size_list\":[201326592]", "\"size_list\":[18446744073709551615,2]"),
      with("\"size_list\":[201326592]", "\"size_list\":{}"),
      with("\"max_shard_size\":134217728", "\"max_shard_size\":0"),
      with("\"max_shard_size\":134217728", "\"max_shard_size\":1"),
      with("\"max_shard_size\":134217728", "\"max_shard_size\":18446744073709551615"),
      with("\"offset\":140000000000000", "\"offset\":-1"),
      with("\"offset\":140000000000000", "\"offset\":\"1\""),
      with("\"segment_name\":\"n2\"", "\"segment_name\":\"\""),
      with("\"replica_list\":null", "\"replica_list\":[7]"),
      with("\"replica_list\":null", "\"replica_list\":7"),
      with("\"name\":\"ckpt/a\"", "\"name\":\"\""),
    ]
    for text in texts {
      #expect(
        code { _ = try UpstreamDocument(json: text) } == .protocolViolation, "\(text.prefix(120))")
    }
  }
}
