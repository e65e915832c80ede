import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Stores of this release among recorded ones of other releases.
@Suite struct RecordedPeerTests {
  /// A cluster that includes a process of another release.
  private struct Neighborhood {
    let cluster: Cluster
    let holder: RecordedHolder
    let recording: Recording
    let directory: StoreDirectory

    init(
      _ recording: Recording, answers: Change = .none, manifest: [UInt8]? = nil
    ) throws {
      cluster = try Cluster()
      self.recording = recording
      holder = try RecordedHolder(recording, in: cluster, answers: answers, manifest: manifest)
      directory = StoreDirectory(
        try MetadataServices.open(MetadataURI(parsing: cluster.server.uri)),
        prefix: MetadataDirectory.prefix(cluster: ""), ttlMilliseconds: 10_000)
    }

    /// Puts the records that the other process had published.
    func publish(_ change: Change, head: Bool = true, record: Bool = true) throws {
      if record {
        let text = holder.own(recording.origin)
        try put(directory.holderKey(try HolderRecord(json: text)), change.apply(to: text))
      }
      if head { try put(headKey, change.apply(to: holder.own(recording.head))) }
    }

    func put(_ key: String, _ value: String) throws {
      try directory.store.put(MetadataEntry(key: key, value: value), lease: nil, testCall)
    }

    var headKey: String { directory.headKey("m") }
  }

  /// Calls that look the payload up by name.
  private static let calls: [(name: String, body: @Sendable (P2PStore) throws -> Void)] = [
    ("get", { _ = try $0.get("m") }),
    (
      "get to files",
      { store in
        let scratch = ScratchDirectory()
        _ = try store.get("m", to: scratch["d"])
      }
    ),
    (
      "read",
      { store in
        let part = Memory(100)
        try store.read("m", offset: 0, into: part.bytes.baseAddress!, length: 100)
      }
    ),
  ]
  private static let queries: [(name: String, body: @Sendable (P2PStore) throws -> Void)] = [
    ("describe", { _ = try $0.describe("m") }), ("remove", { try $0.remove("m") }),
  ]

  /// Expects `body` to throw a refusal that contains some texts.
  private func refused(
    _ what: String, _ parts: [String], sourceLocation: SourceLocation = #_sourceLocation,
    _ body: () throws -> Void
  ) {
    do {
      try body()
      Issue.record("\(what) was not refused", sourceLocation: sourceLocation)
    } catch {
      let message = (error as? MooncakeError)?.message ?? "\(error)"
      #expect(
        (error as? MooncakeError)?.code == .unsupported, "\(what): \(error)",
        sourceLocation: sourceLocation)
      for part in parts {
        #expect(
          message.contains(part), "\(what): no '\(part)' in: \(message)",
          sourceLocation: sourceLocation)
      }
    }
  }

  /// What a watch has reported, such as "appeared m".
  private final class Told: Sendable {
    private let lines = Lock<[String]>([])
    var all: [String] { lines.withLock { $0 } }

    func note(_ change: PayloadChange) {
      let line =
        switch change {
        case .appeared(let info): "appeared \(info.name)"
        case .changed(let info): "changed \(info.name)"
        case .vanished(let name): "vanished \(name)"
        }
      lines.withLock { $0.append(line) }
    }
  }

  // MARK: Their payload, our stores

  @Test(arguments: Recording.all, [Change.none, .grown])
  func whatOthersHoldIsUsedLikeOurs(_ recording: Recording, _ change: Change) throws {
    let place = try Neighborhood(recording, answers: change)
    let (receiver, third) = (try place.cluster.store(), try place.cluster.store())
    let told = Told()
    let watch = try third.watch(prefix: "") { told.note($0) }
    try place.publish(change)
    let model = Recording.payload()

    let part = Memory(Recording.range.count)
    try receiver.read(
      "m", offset: UInt64(Recording.range.lowerBound), into: part.bytes.baseAddress!,
      length: UInt64(Recording.range.count))
    #expect(part.bytes.elementsEqual(model.bytes[Recording.range]))
    #expect(try third.list(prefix: "").map(\.size) == [UInt64(Recording.byteCount)])
    let (info, holders) = try third.describe("m")
    #expect(info.bufferSizes == [UInt64(Recording.byteCount)] && info.holderCount == 1)
    #expect(holders.map(\.segment) == [place.holder.engine.name])

    let copy = Memory(Recording.byteCount)
    let result = try receiver.get("m", into: [copy.buffer])
    #expect(copy.holds(model) && result.isVerified)
    #expect(result.sources.map(\.segment) == [place.holder.engine.name])
    #expect(eventually { told.all == ["appeared m"] }, "\(told.all)")

    // The data from another release is offered onward here.
    place.holder.engine.close()
    let last = Memory(Recording.byteCount)
    let onward = try third.get("m", into: [last.buffer])
    #expect(last.holds(model) && onward.sources.map(\.segment) == [receiver.engine.name])
    try third.remove("m")
    let late = try place.cluster.store()
    expect(.notFound) { _ = try late.get("m") }
    #expect(eventually { (try? receiver.list(prefix: "").isEmpty) == true })
    #expect(eventually { told.all == ["appeared m", "vanished m"] }, "\(told.all)")
    watch.stop()
    #expect(third.passedOver.isEmpty && receiver.passedOver.isEmpty)
  }

  /// The answer that leads to the manifest is used for what comes after it, too.
  @Test func aHolderIsAskedOnceWhereThingsAre() throws {
    let place = try Neighborhood(Recording.all[1])
    try place.publish(.none)
    let store = try place.cluster.store()
    let part = Memory(100)
    try store.read("m", offset: 0, into: part.bytes.baseAddress!, length: 100)
    #expect(place.holder.openCount == 1)
    _ = try store.get("m")
    #expect(place.holder.openCount == 2)
  }

  @Test(arguments: Recording.all)
  func aNewerHeadIsRefusedByWhoNeedsIt(_ recording: Recording) throws {
    let place = try Neighborhood(recording)
    let store = try place.cluster.store()
    let memory = Memory(1000, seed: 1)
    try store.register("n", [memory.buffer])
    try place.publish(.newer)
    for (name, body) in Self.calls + Self.queries {
      refused(
        name,
        [
          place.headKey, "needs version 2", "knows 1", "update libmooncake here",
          "written by \(place.holder.engine.name) at \(place.holder.engine.rpcAddress)",
        ]
      ) { try body(store) }
    }
    // The record is unchanged, and nothing of the payload is held here.
    #expect(try place.directory.store.get(place.headKey, testCall)?.contains(":2,") == true)
    #expect(store.readers(of: "m") == nil)
    withExtendedLifetime(memory) {}
  }

  /// Without a head, the holders' records count, and those are unreadable too.
  @Test(arguments: Recording.all)
  func newerHoldersWithoutAHeadAreNotNobody(_ recording: Recording) throws {
    let place = try Neighborhood(recording)
    let store = try place.cluster.store()
    try place.publish(.newer, head: false)
    let parts = ["store/holder/m/", "needs version 2", "knows 1", place.holder.engine.name]
    for (name, body) in Self.calls + Self.queries { refused(name, parts) { try body(store) } }
    var options = GetOptions()
    options.version = try Manifest(parsing: recording.manifest).version
    refused("get of a version", parts) { _ = try store.get("m", options) }
    options.version = PayloadVersion(high: 1, low: 1)
    expect(.notFound) { _ = try store.get("x", options) }
  }

  @Test func listsAndWatchesTellWhatTheyPassOver() throws {
    let place = try Neighborhood(Recording.all[1])
    let store = try place.cluster.store()
    let memory = Memory(1000, seed: 2)
    try store.register("n", [memory.buffer])
    try place.publish(.newer)
    #expect(try store.list(prefix: "").map(\.name) == ["n"])
    func complaints(of store: P2PStore) -> [String] {
      store.passedOver.filter { $0.contains("needs version 2") && $0.contains("written by") }
    }
    // One for the head, one for the holder's record.
    #expect(complaints(of: store).count == 2, "\(store.passedOver)")

    let other = try place.cluster.store()
    let told = Told()
    let watch = try other.watch(prefix: "") { told.note($0) }
    #expect(eventually { complaints(of: other).contains { $0.contains(place.headKey) } })
    #expect(eventually { told.all == ["appeared n"] }, "\(told.all)")
    // Once readable, it is reported.
    try place.publish(.grown)
    #expect(eventually { told.all == ["appeared n", "appeared m"] }, "\(told.all)")
    // A later release takes the name: readers of this release see it vanish.
    try place.publish(.newer)
    #expect(
      eventually(within: 20_000) { told.all == ["appeared n", "appeared m", "vanished m"] },
      "\(told.all)")
    watch.stop()
    withExtendedLifetime(memory) {}
  }

  @Test(arguments: Recording.all)
  func aNewerHolderAmongOthersIsPassedOver(_ recording: Recording) throws {
    let place = try Neighborhood(recording)
    let (origin, receiver) = (try place.cluster.store(), try place.cluster.store())
    let model = Recording.payload()
    var options = RegisterOptions()
    options.shardBytes = Recording.shardBytes
    let info = try origin.register("m", [model.buffer], options)
    #expect(info.version == (try Manifest(parsing: recording.manifest).version))
    try place.publish(.newer, head: false)
    let copy = Memory(Recording.byteCount)
    let result = try receiver.get("m", into: [copy.buffer])
    #expect(copy.holds(model) && result.sources.map(\.segment) == [origin.engine.name])
    #expect(receiver.passedOver.contains { $0.contains("needs version 2") })
    try receiver.deleteReplica("m")
    let (_, holders) = try receiver.describe("m")
    #expect(holders.map(\.segment) == [origin.engine.name])

    // If it is the only one, it is the reason for the failure.
    try place.publish(.none, record: false)
    place.holder.engine.close()
    try origin.unregister("m")
    try place.publish(.none, record: false)
    for (name, body) in Self.calls {
      refused(name, ["needs version 2", "not asked", "store/holder/m/"]) { try body(receiver) }
    }
  }

  @Test(arguments: Recording.all)
  func newerAnswersAreRefusedByName(_ recording: Recording) throws {
    let place = try Neighborhood(recording, answers: .newer)
    let store = try place.cluster.store()
    try place.publish(.none)
    for (name, body) in Self.calls {
      refused(
        name,
        [
          "needs version 2", "knows 1", "update libmooncake here", place.holder.engine.name,
          "\(place.holder.engine.rpcAddress)",
        ]
      ) { try body(store) }
    }
    #expect(store.readers(of: "m") == nil)
    #expect(try store.list(prefix: "").map(\.name) == ["m"])
    // Other holders of the same version suffice.
    let other = try place.cluster.store()
    let model = Recording.payload()
    var options = RegisterOptions()
    options.shardBytes = Recording.shardBytes
    try other.register("m", [model.buffer], options)
    let copy = Memory(Recording.byteCount)
    _ = try store.get("m", into: [copy.buffer])
    #expect(copy.holds(model))
  }

  @Test func aNewerManifestIsRefusedByName() throws {
    var manifest = Recording.all[1].manifest
    manifest[7] = UInt8(ascii: "2")
    let place = try Neighborhood(Recording.all[1], manifest: manifest)
    let store = try place.cluster.store()
    try place.publish(.none)
    for (name, body) in Self.calls {
      refused(
        name, ["the manifest has version 2", "knows 1", place.holder.engine.name]
      ) { try body(store) }
    }
  }

  /// After its removal there, a holder of another release is no longer found.
  @Test(arguments: [Change.none, .grown])
  func theirRemovalsCountHere(_ change: Change) throws {
    let place = try Neighborhood(Recording.all[1])
    let store = try place.cluster.store()
    try place.publish(.none, head: false)
    #expect(try store.list(prefix: "").map(\.name) == ["m"])
    let version = try Manifest(parsing: place.recording.manifest).version
    try place.put(
      place.directory.tombstoneKey("m", version), change.apply(to: place.recording.removed))
    expect(.notFound) { _ = try store.get("m") }
    #expect(try store.list(prefix: "").isEmpty)
    #expect(store.passedOver.isEmpty)
  }

  // MARK: Their lists of files

  /// A later release's list of files: the payload's bytes can be fetched, only files are refused.
  @Test(arguments: [Change.grown, .newer])
  func listsOfFilesOfLaterReleases(_ change: Change) throws {
    let cluster = try Cluster()
    let (origin, receiver, third) = (
      try cluster.store(), try cluster.store(), try cluster.store()
    )
    let memory = [Memory(3, seed: 1), Memory(1024, seed: 2)]
    let list = try Manifest(parsing: Recording.all[1].filesManifest).attributes
    var options = RegisterOptions()
    options.attributes = Array(change.apply(to: String(decoding: list, as: UTF8.self)).utf8)
    try origin.register("f", memory.map(\.buffer), options)
    let copies = [Memory(3), Memory(1024)]
    _ = try receiver.get("f", into: copies.map(\.buffer))
    #expect(copies[0].holds(memory[0]) && copies[1].holds(memory[1]))
    try origin.unregister("f")
    let result = try third.get("f")
    #expect(result.sources.map(\.segment) == [receiver.engine.name])
    try third.deleteReplica("f")

    let scratch = ScratchDirectory()
    if change == .newer {
      refused("get to files", ["payload 'f'", "list of files needs version 2", "knows 1"]) {
        _ = try third.get("f", to: scratch["d"])
      }
      #expect(scratch.names() == [])
    } else {
      let got = try third.get("f", to: scratch["d"])
      #expect(scratch.names(in: "d") == ["config.json", "empty", "weights"])
      try got.files.withdraw()
    }
  }

  // MARK: Their questions, our holder

  /// A store that holds what the recorded one held, and is asked recorded questions.
  private struct Asked {
    let cluster: Cluster
    let store: P2PStore
    let memory = Recording.payload()
    let holding: Holding
    private let recordedHolding: String

    init(_ recording: Recording) throws {
      cluster = try Cluster()
      store = try cluster.store()
      var options = RegisterOptions()
      options.shardBytes = Recording.shardBytes
      try store.register("m", [memory.buffer], options)
      holding = try #require(store.readers(of: "m"))
      recordedHolding = HexNumber.text(try HolderRecord(json: recording.origin).holder.holding)
    }

    func answer(_ question: String, _ change: Change) throws -> String {
      let text = question.replacing(
        recordedHolding, with: HexNumber.text(holding.address.holding))
      return try store.engine.callService(
        at: holding.address.rpc, change.apply(to: text), until: .after(milliseconds: 5000))
    }
  }

  /// The names of members, with the values of those that do not depend on addresses.
  private func members(_ text: String) throws -> [String: String] {
    try JSONDocument(parsing: text).read { value throws(MooncakeError) in
      var members: [String: String] = [:]
      for member in value.elements {
        let name = member.name ?? ""
        let isPlace = ["manifest_address", "table_address", "peers"].contains(name)
        var granted = 0
        for _ in member.elements { granted += 1 }
        let value = member.string ?? "\(member.unsigned ?? 0)"
        members[name] = isPlace ? "" : member.isArray ? "\(granted) of them" : value
      }
      return members
    }
  }

  @Test(arguments: Recording.all, [Change.none, .grown])
  func questionsOfOthersAreAnsweredAsTheyWereThere(
    _ recording: Recording, _ change: Change
  ) throws {
    for exchanges in [recording.get, recording.read] {
      let asked = try Asked(recording)
      for exchange in exchanges {
        let answer = try members(try asked.answer(exchange.question, change))
        for (name, value) in try members(exchange.answer) where name != "peers" {
          #expect(answer[name] == value, "\(name) of \(answer) to \(exchange.question)")
        }
      }
      // The last question was the reader's goodbye.
      #expect(asked.holding.grantCount == 0)
    }
    let asked = try Asked(recording)
    try asked.store.unregister("m")
    #expect(try asked.answer(recording.gone.question, change) == recording.gone.answer)
  }

  @Test(arguments: Recording.all)
  func newerQuestionsAreRefusedWithTheReason(_ recording: Recording) throws {
    let asked = try Asked(recording)
    for exchange in recording.get + recording.read {
      let answer = try asked.answer(exchange.question, .newer)
      #expect(answer.contains(#""reason":"version","store_version":1"#), "\(answer)")
      // Our refusal, as read by this release.
      refused("the question", ["needs version 2", "this holder knows 1", "update libmooncake"]) {
        _ = try ShardAnswer(json: answer, shardCount: 4)
      }
    }
    #expect(asked.holding.grantCount == 0)
    let malformed = try asked.answer(
      #"{"store_version":"x","#
        + recording.get[0].question.dropFirst().replacing(#","store_version":1"#, with: ""), .none)
    #expect(malformed.contains("malformed store_version"), "\(malformed)")
    let later = try asked.answer(#"{"service":"store","op":"later","store_version":3}"#, .none)
    #expect(later.contains(#""reason":"version","store_version":1"#), "\(later)")
  }
}
