// Feeds arbitrary bytes to the store's readers of data from peers and metadata services: manifests,
// lists of files, records, documents, questions and answers. Both sides of the swarm act on the
// result. A trap, a sanitizer report or a broken round trip is a finding.

import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import MooncakeSystem

private let shardCount = 77

@c(LLVMFuzzerInitialize)
public func initialize(
  _ count: UnsafeMutablePointer<CInt>?, _ arguments: UnsafeMutableRawPointer?
) -> CInt {
  Log.setLevel(.off)
  return 0
}

/// The first byte selects the kind of input; in texts, bytes from 0x80 on are words of
/// `vocabulary`.
@c(LLVMFuzzerTestOneInput)
public func testOneInput(_ data: UnsafePointer<UInt8>?, _ size: Int) -> CInt {
  guard let data, size > 0 else { return 0 }
  let bytes = Array(UnsafeBufferPointer(start: data + 1, count: size - 1))
  if data[0] & 0x7F < 0x20 {
    readManifest(bytes)
    return 0
  }
  if data[0] < 0x80 {
    if let text = String(validating: bytes, as: UTF8.self) { readText(text) }
  } else {
    readText(bytes.map { vocabulary[Int($0) % vocabulary.count] }.joined())
  }
  return 0
}

private func readManifest(_ bytes: [UInt8]) {
  guard let manifest = try? Manifest(parsing: bytes) else { return }
  guard manifest.bytes == bytes, let again = try? Manifest(parsing: manifest.bytes),
    again == manifest
  else { fatalError("a manifest does not survive its own bytes") }
  for shard in 0..<min(manifest.layout.shardCount, 4) {
    let range = manifest.layout.range(ofShard: shard)
    if range.length == 0 || range.offset + range.length > manifest.layout.size {
      fatalError("shard \(shard) is not in the payload")
    }
    if manifest.layout.shard(at: range.offset) != shard { fatalError("shard \(shard) is lost") }
  }
  _ = try? FileList(parsing: manifest)
}

private func readText(_ text: String) {
  if let record = try? HolderRecord(json: text) {
    if (try? HolderRecord(json: record.json)) != record { fatalError("a record changes: \(text)") }
  }
  if let head = try? PayloadHead(json: text) {
    if (try? PayloadHead(json: head.json)) != head { fatalError("a head changes: \(text)") }
  }
  if let document = try? UpstreamDocument(json: text) {
    if (try? UpstreamDocument(json: document.json)) == nil {
      fatalError("a document ends: \(text)")
    }
  }
  if let answer = try? ShardAnswer(json: text, shardCount: shardCount) { act(on: answer) }
  if let document = try? JSONDocument(parsing: text) {
    let request = document.read { try? ShardRequest(json: $0, shardCount: shardCount) }
    if let request { act(on: request) }
  }
}

/// A holder with every other shard.
private func act(on request: ShardRequest) {
  var available = ShardSet(count: shardCount)
  for shard in stride(from: 0, to: shardCount, by: 2) { available.insert(shard) }
  var ledger = UploadLedger(shardCount: shardCount, seed: 1)
  for time in [1, 2, 20_000_000_000] as [UInt64] {
    let answer = ledger.answer(request, available: available, now: time)
    for shard in answer.granted
    where !available.contains(shard) || request.have.contains(shard) {
      fatalError("shard \(shard) is granted, which is not there or not wanted")
    }
    _ = ledger.outstandingCount(now: time)
  }
}

/// A receiver that has asked one holder.
private func act(on answer: ShardAnswer) {
  let holder = HolderAddress(holding: 1, rpc: "h:1", segment: "h:1")
  var plan = DownloadPlan(
    shardCount: shardCount, shardBytes: 1 << 20, version: PayloadVersion(high: 1, low: 2), own: nil,
    reader: 3, seed: 4)
  plan.add(holder, isOrigin: true)
  for time in 1...8 as ClosedRange<UInt64> {
    var steps = 0
    while let action = plan.next(time * 100_000_000) {
      steps += 1
      if steps > 10_000 { fatalError("the plan never rests") }
      switch action {
      case .ask(let asked, _, _):
        plan.answered(by: asked, answer, now: time * 100_000_000)
      case .read(let from, let shard):
        plan.finished(shard, from: from, isIntact: shard % 3 != 0, now: time * 100_000_000)
      case .cancel(let from, let shard):
        plan.failed(shard, from: from, reason: "-", isDead: false, now: time * 100_000_000)
      case .discover: plan.discovered(now: time * 100_000_000)
      case .leave: break
      }
    }
  }
}

private let vocabulary = [
  "{", "}", "[", "]", ",", ":", "\"", "null", "true", "false", "0", "1", "7", "76", "77", "1048576",
  "9223372036854775807", "18446744073709551615", "-1", "1.5", "\"\"", "\"n\"", "\"h:1\"",
  "\"00000000000000010000000000000002\"", "\"0000000000000001\"", "\"name\":\"n\",",
  "\"version\":\"00000000000000010000000000000002\",", "\"holding\":\"0000000000000001\",",
  "\"rpc\":\"h:1\",", "\"segment\":\"h:1\",", "\"size\":", "\"shard_bytes\":", "\"shards\":",
  "\"buffers\":", "\"published_ms\":", "\"writable\":", "\"complete\":", "\"origin\":",
  "\"size_list\":[", "\"max_shard_size\":", "\"gold\":[", "\"replica_list\":",
  "\"segment_name\":\"h:1\",", "\"offset\":", "\"service\":\"store\",", "\"op\":\"ask\",",
  "\"reader\":", "\"have\":\"AAAAAAAAAAAAAA==\",", "\"from\":", "\"to\":", "\"turn\":",
  "\"reading\":[", "\"limit\":",
  "\"state\":", "\"granted\":[", "\"lease_ms\":", "\"retry_ms\":", "\"held\":", "\"readers\":",
  "\"peers\":[", "\"own\":",
]
