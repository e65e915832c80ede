import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Testing

/// Messages and records of the stores of some release. The texts are in `Tests/recordings`, which
/// also says how they were recorded.
struct Recording: Sendable, CustomTestStringConvertible {
  struct Exchange: Sendable {
    let question: String
    let answer: String
  }

  struct Malformed: Error { let part: String }

  let release: String
  /// The payload "m": `byteCount` bytes in memory.
  let manifest: [UInt8]
  let head: String
  let origin: String
  let replica: String
  let removed: String
  /// A get of all of it, a read of a range, and a question about a payload no longer held.
  let get: [Exchange]
  let read: [Exchange]
  let gone: Exchange
  /// A published directory.
  let filesManifest: [UInt8]

  static let byteCount = 200_000
  static let shardBytes: UInt64 = 64 << 10
  /// The range that was read.
  static let range = 10..<1010
  static let files = [
    FileList.File(path: "config.json", size: 3, isExecutable: true),
    FileList.File(path: "empty", size: 0), FileList.File(path: "weights/part-1", size: 1024),
  ]

  /// The bytes of the payload.
  static func payload() -> Memory {
    let memory = Memory(byteCount)
    for index in 0..<byteCount { memory.bytes[index] = UInt8(index * 7 % 251) }
    return memory
  }

  /// From before and after messages carried a version.
  static let all = ["without-version", "version-1"].map { try! Recording($0) }

  var testDescription: String { release }

  init(_ release: String) throws {
    self.release = release
    let document = try JSONDocument(parsing: try Self.contents("\(release).json"))
    let parts = try document.read { value throws(Malformed) in
      func text(_ value: JSONValue?, _ name: String) throws(Malformed) -> String {
        guard let text = value?[name]?.string else { throw Malformed(part: name) }
        return text
      }
      func exchange(_ value: JSONValue) throws(Malformed) -> Exchange {
        Exchange(question: try text(value, "question"), answer: try text(value, "answer"))
      }
      func exchanges(_ value: JSONValue?) throws(Malformed) -> [Exchange] {
        var found: [Exchange] = []
        for item in value?.elements ?? .none { found.append(try exchange(item)) }
        if found.isEmpty { throw Malformed(part: "exchanges") }
        return found
      }
      guard let memory = value["memory"], let gone = memory["gone"] else {
        throw Malformed(part: "memory")
      }
      let records = memory["records"]
      return (
        texts: [
          try text(memory, "manifest"), try text(records, "head"), try text(records, "origin"),
          try text(records, "replica"), try text(records, "removed"),
          try text(value["files"], "manifest"),
        ],
        get: try exchanges(memory["get"]), read: try exchanges(memory["read"]),
        gone: try exchange(gone)
      )
    }
    guard let manifest = Base64.decode(parts.texts[0]),
      let filesManifest = Base64.decode(parts.texts[5])
    else { throw Malformed(part: "manifest") }
    (self.manifest, self.filesManifest) = (manifest, filesManifest)
    (head, origin, replica, removed) = (
      parts.texts[1], parts.texts[2], parts.texts[3], parts.texts[4]
    )
    (get, read, gone) = (parts.get, parts.read, parts.gone)
  }

  private static func contents(_ name: String) throws -> [UInt8] {
    // This file is in Tests/MooncakeP2PTests/Support.
    let path = #filePath.split(separator: "/").dropLast(3).joined(separator: "/")
    let file = open("/\(path)/recordings/\(name)", O_RDONLY)
    if file < 0 { throw Malformed(part: "/\(path)/recordings/\(name)") }
    defer { close(file) }
    var bytes = [UInt8](repeating: 0, count: 1 << 20)
    return Array(bytes[..<max(0, Glibc.read(file, &bytes, bytes.count))])
  }
}

/// How a later release may change a text.
enum Change: Sendable {
  case none
  /// Adds members that a reader may ignore.
  case grown
  /// Adds members that a reader must understand.
  case newer

  func apply(to text: String) -> String {
    if self == .none { return text }
    let more = #""color":{"red":[1,null]},"#
    let grown = "{" + more + text.dropFirst().replacing(#""rpc":"#, with: more + #""rpc":"#)
    if self == .grown { return grown }
    let version = #""store_version":"#
    return "{" + version + "2,"
      + grown.dropFirst().replacing(version + "1,", with: "")
      .replacing("," + version + "1", with: "")
  }
}

/// A recorded process of another release: its payload "m" is in this process's memory, its records
/// are in a metadata service, and it gives the recorded answers.
final class RecordedHolder: Sendable {
  let engine: TransferEngine
  private let recording: Recording
  private let answers: Change
  private let memory = Recording.payload()
  private let holding: String
  private let recordedAddress: (rpc: String, segment: String)
  private let manifestAddress: UInt64
  private let manifestByteCount: Int
  /// How often each reader has asked.
  private let counts = Lock<[String: Int]>([:])
  private let opens = Lock(0)

  init(
    _ recording: Recording, in cluster: Cluster, answers: Change = .none,
    manifest: [UInt8]? = nil
  ) throws {
    var options = TransferEngine.Options()
    options.metadataURI = cluster.server.uri
    options.transports = ["tcp"]
    options.name = "recorded-\(UInt64.random(in: 0 ... .max))"
    engine = try TransferEngine(options)
    self.recording = recording
    self.answers = answers
    let holder = try HolderRecord(json: recording.origin).holder
    holding = HexNumber.text(holder.holding)
    recordedAddress = (holder.rpc, holder.segment)
    try engine.register(
      memory.bytes.baseAddress!, length: UInt64(memory.bytes.count), access: .remoteRead)
    let bytes = manifest ?? recording.manifest
    let index = try engine.allocate(
      length: UInt64(bytes.count + Holding.rowBytes), access: .remoteRead)
    bytes.withUnsafeBytes { index.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
    let row = [UInt64(UInt(bitPattern: memory.bytes.baseAddress!)), UInt64(memory.bytes.count)]
    row.withUnsafeBytes {
      (index + bytes.count).copyMemory(from: $0.baseAddress!, byteCount: $0.count)
    }
    manifestAddress = UInt64(UInt(bitPattern: index))
    manifestByteCount = bytes.count
    _ = engine.services.add { [weak self] call in self?.answer(call) }
  }

  deinit { engine.close() }

  /// How often it was asked where its manifest and its buffers are.
  var openCount: Int { opens.withLock { $0 } }

  /// A recorded text as if this process had written it.
  func own(_ text: String) -> String {
    text.replacing(#""rpc":"\#(recordedAddress.rpc)""#, with: #""rpc":"\#(engine.rpcAddress)""#)
      .replacing(
        #""segment":"\#(recordedAddress.segment)""#, with: #""segment":"\#(engine.name)""#)
  }

  private func answer(_ call: JSONValue) -> String? {
    guard call["service"]?.string == StoreService.name, call["holding"]?.string == holding else {
      return nil
    }
    let exchanges = call["from"] == nil ? recording.get : recording.read
    if call["op"]?.string == "open" {
      opens.withLock { $0 += 1 }
      return answers.apply(to: placed(exchanges[0].answer))
    }
    let reader = call["reader"]?.string ?? ""
    let asked = exchanges.filter { $0.question.contains(#""op":"ask""#) }
    let count = counts.withLock { counts in
      counts[reader, default: 0] += 1
      return counts[reader]!
    }
    return answers.apply(to: asked[min(count, asked.count) - 1].answer)
  }

  /// Replaces recorded addresses by present ones.
  private func placed(_ text: String) -> String {
    text.replacing(number: "manifest_address", with: manifestAddress)
      .replacing(number: "manifest_bytes", with: UInt64(manifestByteCount))
      .replacing(number: "table_address", with: manifestAddress + UInt64(manifestByteCount))
  }
}

extension StringProtocol {
  /// Works without Foundation.
  func replacing(_ part: String, with other: String) -> String {
    split(separator: part, omittingEmptySubsequences: false).joined(separator: other)
  }

  func contains(_ part: String) -> Bool {
    split(separator: part, omittingEmptySubsequences: false).count > 1
  }

  /// Changes the number of a member.
  func replacing(number name: String, with value: UInt64) -> String {
    let start = #""\#(name)":"#
    let parts = split(separator: start, maxSplits: 1, omittingEmptySubsequences: false)
    guard parts.count == 2 else { return String(self) }
    return parts[0] + start + "\(value)" + parts[1].drop { $0.isNumber }
  }
}
