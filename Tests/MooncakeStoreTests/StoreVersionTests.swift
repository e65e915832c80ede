import MooncakeEngine
import MooncakeStore
import MooncakeSystem
import Testing

/// Recorded texts of releases before and after this one.
@Suite struct StoreVersionTests {
  /// As the first release wrote them, without a version.
  private enum Older {
    static let question =
      #"{"service":"store","op":"ask","holding":"0000000000000001","#
      + #""version":"00000000000000070000000000000001","reader":"0000000000000005","turn":9,"#
      + #""limit":2}"#
    static let answer =
      #"{"state":0,"granted":[1],"lease_ms":10000,"retry_ms":0,"held":2,"readers":1}"#
    static let summary =
      #""name":"a","version":"00000000000000070000000000000001","size":100,"shard_bytes":64,"#
      + #""shards":2,"buffers":1,"published_ms":1,"writable":false"#
    static let address = #"{"holding":"0000000000000001","rpc":"10.0.0.1:7","segment":"node-1"}"#
    static let record = "{\(summary),\"holder\":\(address),\"origin\":true,\"complete\":true}"
    static let head = "{\(summary),\"origin\":\(address)}"
    static let files = #"{"files":[{"path":"a","size":1}]}"#
    static let all = [question, answer, record, head, files]
  }

  /// A text with one more member.
  private func adding(_ member: String, to text: String) -> String {
    String(text.dropLast()) + "," + member + "}"
  }

  private func manifest(_ attributes: String) throws -> Manifest {
    try Manifest(
      layout: ShardLayout(bufferSizes: [1], shardBytes: 1 << 20),
      digests: [Digest(high: 0, low: 0)], attributes: Array(attributes.utf8))
  }

  /// Reads each kind of text.
  private func read(_ texts: [String]) throws {
    _ = try ShardAnswer(json: texts[1], shardCount: 2)
    _ = try JSONDocument(parsing: texts[0]).read { value throws(EngineError) in
      try ShardRequest(json: value, shardCount: 2)
    }
    #expect(try HolderRecord(json: texts[2]) == testRecord("a", holding: 1))
    let record = testRecord("a", holding: 1)
    #expect(try PayloadHead(json: texts[3]) == PayloadHead(record.summary, origin: record.holder))
    #expect(try FileList(parsing: manifest(texts[4])).files.map(\.path) == ["a"])
  }

  @Test func textsOfAnOlderRelease() throws { try read(Older.all) }

  @Test func membersThatAreNotKnown() throws {
    try read(Older.all.map { adding(#""store_version":1,"color":{"red":[1]}"#, to: $0) })
  }

  @Test func textsOfANewerRelease() throws {
    let texts = Older.all.map { adding(#""store_version":2"#, to: $0) }
    let failures = [
      failure { _ = try ShardAnswer(json: texts[1], shardCount: 2) },
      failure { _ = try HolderRecord(json: texts[2]) },
      failure { _ = try PayloadHead(json: texts[3]) },
      failure { _ = try FileList(parsing: try manifest(texts[4])) },
    ]
    for failure in failures {
      #expect(failure?.code == .unsupported)
      #expect(failure?.message.contains("needs version 2") == true, "\(failure?.message ?? "")")
      #expect(failure?.message.contains("knows 1") == true)
    }
    #expect(
      failure { _ = try HolderRecord(json: adding(#""store_version":"x""#, to: Older.record)) }?
        .code == .protocolViolation)
  }

  @Test func aManifestOfANewerRelease() throws {
    var bytes = try manifest("").bytes
    bytes[7] = UInt8(ascii: "2")
    let error = failure { _ = try Manifest(parsing: bytes) }
    #expect(error?.code == .unsupported && error?.message.contains("version 2") == true)
    bytes[7] = UInt8(ascii: "x")
    #expect(failure { _ = try Manifest(parsing: bytes) }?.code == .protocolViolation)
  }

  /// The identity of what is published does not depend on the release.
  @Test func aListOfFilesSaysNoVersion() throws {
    #expect(
      String(decoding: try FileList([.init(path: "a", size: 1)]).json, as: UTF8.self)
        == Older.files)
  }

  // MARK: Peers

  /// Stands between stores: passes questions on, and changes both texts.
  private func between(
    _ cluster: Cluster, _ origin: P2PStore, _ change: @escaping @Sendable (String) -> String
  ) throws -> TransferEngine {
    let middle = try TransferEngine(TransferEngine.Options())
    let rpc = origin.engine.rpcAddress.description
    let caller = origin.engine
    _ = middle.services.add { call in
      var writer = JSONWriter()
      call.write(to: &writer)
      let question = change(writer.text)
      let answer = try? caller.callService(at: rpc, question, until: .after(milliseconds: 5000))
      return answer.map(change)
    }
    // Whoever looks for the payload finds the one between.
    let service = try MetadataStores.open(MetadataURI(parsing: cluster.server.uri))
    let directory = StoreDirectory(
      service, prefix: MetadataDirectory.prefix(cluster: ""), ttlMilliseconds: 10_000)
    let head = try #require(try directory.head("a", testCall))
    let holder = HolderAddress(
      holding: head.origin.holding, rpc: middle.rpcAddress.description,
      segment: head.origin.segment)
    let record = HolderRecord(origin: PayloadHead(head.summary, origin: holder))
    _ = try service.delete(directory.holderKey(record), testCall)
    try service.put(
      MetadataEntry(
        key: directory.headKey("a"), value: PayloadHead(head.summary, origin: holder).json),
      lease: nil, testCall)
    return middle
  }

  private static let own = #""store_version":1"#

  @Test func bothDirectionsWithAnOlderPeer() throws {
    let cluster = try Cluster()
    let (origin, receiver) = (try cluster.store(), try cluster.store())
    let (memory, copy) = (Memory(300_000, seed: 1), Memory(300_000))
    try origin.register("a", [memory.buffer])
    // Neither side ever sees a version.
    let middle = try between(cluster, origin) { text in
      text.replacing(Self.own + ",", with: "").replacing("," + Self.own, with: "")
    }
    _ = try receiver.get("a", into: [copy.buffer])
    #expect(copy.holds(memory))
    middle.close()
  }

  @Test func aNewerHolderIsNamedWithBothVersions() throws {
    let cluster = try Cluster()
    let (origin, receiver) = (try cluster.store(), try cluster.store())
    let memory = Memory(300_000, seed: 2)
    try origin.register("a", [memory.buffer])
    let middle = try between(cluster, origin) { text in
      // Questions pass; its answers need what this release does not know.
      text.contains(#""service""#)
        ? text : text.replacing(Self.own, with: #""store_version":2"#)
    }
    let error = failure { _ = try receiver.get("a") }
    #expect(error?.code == .unsupported)
    for part in ["needs version 2", "knows 1", origin.engine.name] {
      #expect(error?.message.contains(part) == true, "\(error?.message ?? "")")
    }
    middle.close()
    withExtendedLifetime(memory) {}
  }

  @Test func aNewerQuestionIsRefusedWithTheReason() throws {
    let cluster = try Cluster()
    let (origin, receiver) = (try cluster.store(), try cluster.store())
    let memory = Memory(300_000, seed: 3)
    try origin.register("a", [memory.buffer])
    let middle = try between(cluster, origin) { text in
      text.contains(#""service""#)
        ? text.replacing(Self.own, with: #""store_version":2"#) : text
    }
    // What the newer one makes of the refusal is what this release makes of it.
    let error = failure { _ = try receiver.get("a") }
    #expect(error?.code == .unsupported)
    for part in ["needs version 2", "this holder knows 1", origin.engine.name] {
      #expect(error?.message.contains(part) == true, "\(error?.message ?? "")")
    }
    let answer = try receiver.engine.callService(
      at: origin.engine.rpcAddress.description,
      #"{"service":"store","op":"later","store_version":3}"#, until: .after(milliseconds: 5000))
    #expect(answer.contains(#""reason":"version","store_version":1"#), "\(answer)")
    middle.close()
    withExtendedLifetime(memory) {}
  }

  /// What `body` throws.
  private func failure(_ body: () throws -> Void) -> EngineError? {
    do { try body() } catch { return error as? EngineError }
    return nil
  }
}

extension JSONValue {
  fileprivate func write(to writer: inout JSONWriter) {
    if isObject {
      writer.beginObject()
      for member in elements {
        writer.name(member.name ?? "")
        member.write(to: &writer)
      }
      writer.endObject()
    } else if isArray {
      writer.beginArray()
      for element in elements { element.write(to: &writer) }
      writer.endArray()
    } else if let string {
      writer.value(string)
    } else if let unsigned {
      writer.value(unsigned)
    } else {
      writer.value(isTrue)
    }
  }
}

extension String {
  /// Without Foundation.
  fileprivate func replacing(_ part: String, with other: String) -> String {
    split(separator: part, omittingEmptySubsequences: false).joined(separator: other)
  }

  fileprivate func contains(_ part: String) -> Bool {
    utf8.count >= part.utf8.count
      && split(separator: part, omittingEmptySubsequences: false).count > 1
  }
}
