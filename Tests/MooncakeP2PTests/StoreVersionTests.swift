import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Testing

/// Recorded texts of older and newer releases, read by this one.
@Suite struct StoreVersionTests {
  /// What `body` throws.
  private func failure(_ body: () throws -> Void) -> MooncakeError? {
    do { try body() } catch { return error as? MooncakeError }
    return nil
  }

  private func request(_ exchange: Recording.Exchange) throws -> ShardRequest {
    try JSONDocument(parsing: exchange.question).read { value throws(MooncakeError) in
      try ShardRequest(json: value, shardCount: 4)
    }
  }

  private func asks(_ exchanges: [Recording.Exchange]) -> [Recording.Exchange] {
    exchanges.filter { $0.question.contains(#""op":"ask""#) }
  }

  private func manifest(_ attributes: String) throws -> Manifest {
    let sizes = Recording.files.map(\.size).filter { $0 > 0 }
    let layout = try ShardLayout(bufferSizes: sizes, shardBytes: 1 << 20)
    return try Manifest(
      layout: layout, digests: sizes.map { _ in Digest(high: 0, low: 0) },
      attributes: Array(attributes.utf8))
  }

  @Test(arguments: Recording.all, [Change.none, .grown])
  func textsOfOtherReleases(_ recording: Recording, _ change: Change) throws {
    let head = try PayloadHead(json: change.apply(to: recording.head))
    let origin = try HolderRecord(json: change.apply(to: recording.origin))
    let replica = try HolderRecord(json: change.apply(to: recording.replica))
    #expect(head.name == "m" && head.origin == origin.holder && head.origin.segment == "origin")
    #expect(head.size == UInt64(Recording.byteCount) && head.shardCount == 4)
    #expect(head.shardBytes == Recording.shardBytes && head.publishedMilliseconds > 0)
    #expect(origin.summary == head.summary && replica.summary == head.summary)
    #expect(origin.isOrigin && origin.isComplete && !origin.isSuperseded)
    #expect(!replica.isOrigin && replica.isComplete && replica.holder.segment == "receiver")

    let requests = try asks(recording.get).map {
      try request(.init(question: change.apply(to: $0.question), answer: $0.answer))
    }
    #expect(requests.allSatisfy { $0.holding == origin.holder.holding })
    #expect(requests.allSatisfy { $0.version == head.version })
    #expect(requests[0].own == replica.holder && requests[0].limit > 0)
    let read = try asks(recording.read).map(request)
    #expect(read[0].wanted == 0..<1 && read.last?.limit == 0)
    let answers = try asks(recording.get).map {
      try ShardAnswer(json: change.apply(to: $0.answer), shardCount: 4)
    }
    #expect(Set(answers.flatMap(\.granted)) == Set(0..<4))
    #expect(answers.allSatisfy { $0.state == .serving && $0.heldCount == 4 })

    let files = try Manifest(parsing: recording.filesManifest)
    #expect(try FileList(parsing: files).files == Recording.files)
    let text = change.apply(to: String(decoding: files.attributes, as: UTF8.self))
      .replacing(#"{"path""#, with: #"{"color":[{}],"path""#)
    #expect(try FileList(parsing: manifest(text)).files == Recording.files)
  }

  /// A payload published by one release has the same version in every other.
  @Test(arguments: Recording.all)
  func theSameBytesAreTheSameVersion(_ recording: Recording) throws {
    let cluster = try Cluster()
    let store = try cluster.store()
    let memory = Recording.payload()
    var options = RegisterOptions()
    options.shardBytes = Recording.shardBytes
    let info = try store.register("m", [memory.buffer], options)
    #expect(info.version == (try Manifest(parsing: recording.manifest).version))
    #expect(store.readers(of: "m")?.manifest.bytes == recording.manifest)

    let scratch = ScratchDirectory()
    scratch.write("d/config.json", Array("{}\n".utf8), mode: 0o755)
    scratch.write("d/empty", [])
    scratch.write("d/weights/part-1", (0..<1024).map { UInt8($0 % 256) })
    let published = try store.publish("f", files: [scratch["d"]])
    #expect(store.readers(of: "f")?.manifest.bytes == recording.filesManifest)
    try published.files.withdraw()
    withExtendedLifetime(memory) {}
  }

  @Test(arguments: Recording.all)
  func textsOfANewerRelease(_ recording: Recording) throws {
    let newer = Change.newer
    let files = String(
      decoding: try Manifest(parsing: recording.filesManifest).attributes, as: UTF8.self)
    let failures = [
      failure {
        _ = try ShardAnswer(json: newer.apply(to: asks(recording.get)[0].answer), shardCount: 4)
      },
      failure { _ = try HolderRecord(json: newer.apply(to: recording.origin)) },
      failure { _ = try PayloadHead(json: newer.apply(to: recording.head)) },
      failure { _ = try FileList(parsing: manifest(newer.apply(to: files))) },
    ]
    for failure in failures {
      #expect(failure?.code == .unsupported)
      for part in ["needs version 2", "knows 1", "update libmooncake here"] {
        #expect(failure?.message.contains(part) == true, "\(failure?.message ?? "")")
      }
    }
    for failure in failures[1...2] {
      #expect(failure?.message.contains("written by origin at 127.0.0.1:") == true)
    }
    let malformed = recording.origin.replacing(#"{"#, with: #"{"store_version":"x","#)
    #expect(failure { _ = try HolderRecord(json: malformed) }?.code == .protocolViolation)
  }

  @Test func aManifestOfANewerRelease() throws {
    var bytes = Recording.all[1].manifest
    bytes[7] = UInt8(ascii: "2")
    let error = failure { _ = try Manifest(parsing: bytes) }
    #expect(error?.code == .unsupported && error?.message.contains("version 2") == true)
    bytes[7] = UInt8(ascii: "x")
    #expect(failure { _ = try Manifest(parsing: bytes) }?.code == .protocolViolation)
  }

  /// The identity of a payload does not depend on the release.
  @Test func aListOfFilesSaysNoVersion() throws {
    #expect(
      String(decoding: try FileList([.init(path: "a", size: 1)]).json, as: UTF8.self)
        == #"{"files":[{"path":"a","size":1}]}"#)
  }
}
