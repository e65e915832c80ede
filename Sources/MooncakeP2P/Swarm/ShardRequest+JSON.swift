import MooncakeBase
import MooncakeEngine

/// Limits of what travels between holders; beyond them a message is refused.
package enum ShardMessageLimits {
  package static let peerCount = 16
  package static let grantCount = 1024
  /// Bytes of an address or a segment's name.
  package static let nameBytes = 1024
  package static let milliseconds: UInt64 = 86_400_000
  package static let readerCount: UInt64 = 1 << 32
}

extension ShardRequest {
  /// The call of a holder's service that carries it.
  package var json: String {
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("service", "store")
    writer.member("op", "ask")
    writer.member("holding", HexNumber.text(holding))
    writer.member("version", version.description)
    writer.member("reader", HexNumber.text(reader))
    if let own {
      writer.name("own")
      own.write(to: &writer)
    }
    // A receiver that reads a range has nothing: a long row of zeros need not be sent.
    if !have.isEmpty { writer.member("have", Base64.encode(have.bytes)) }
    if let wanted {
      writer.member("from", UInt64(wanted.lowerBound))
      writer.member("to", UInt64(wanted.upperBound))
    }
    writer.member("turn", turn)
    if !reading.isEmpty { writer.write("reading", reading) }
    writer.member("limit", UInt64(limit))
    writer.storeVersion()
    writer.endObject()
    return writer.text
  }

  /// Reads a request about a payload of this many shards.
  package init(json value: JSONValue, shardCount: Int) throws(MooncakeError) {
    guard let text = value["version"]?.string, let version = PayloadVersion(text) else {
      throw malformed("version")
    }
    let own = try value["own"].map { value throws(MooncakeError) in
      try HolderAddress(parsing: value)
    }
    var wanted: Range<Int>?
    if value["from"] != nil || value["to"] != nil {
      let from = try parseNumber(value["from"], "from", upTo: UInt64(shardCount))
      let to = try parseNumber(value["to"], "to", upTo: UInt64(shardCount))
      if from > to { throw malformed("to") }
      wanted = Int(from)..<Int(to)
    }
    self.init(
      holding: try parseHexadecimal(value["holding"], "holding"), version: version,
      reader: try parseHexadecimal(value["reader"], "reader"), own: own,
      have: try parseShardSet(value["have"], shardCount: shardCount), wanted: wanted,
      turn: try parseNumber(value["turn"], "turn", upTo: .max),
      reading: try parseShards(value["reading"], "reading", shardCount: shardCount),
      limit: Int(
        try parseNumber(value["limit"], "limit", upTo: UInt64(ShardMessageLimits.grantCount))))
  }
}

extension ShardAnswer {
  package var json: String {
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("state", state.rawValue)
    writer.storeVersion()
    if !granted.isEmpty { writer.write("granted", granted) }
    writer.member("lease_ms", leaseMilliseconds)
    writer.member("retry_ms", retryMilliseconds)
    writer.member("held", UInt64(heldCount))
    writer.member("readers", UInt64(readerCount))
    if !peers.isEmpty {
      writer.name("peers")
      writer.beginArray()
      for peer in peers { peer.write(to: &writer) }
      writer.endArray()
    }
    writer.endObject()
    return writer.text
  }

  /// Reads an answer about a payload of this many shards.
  package init(json text: String, shardCount: Int) throws(MooncakeError) {
    let document: JSONDocument
    do throws(JSONError) {
      document = try JSONDocument(parsing: text)
    } catch {
      throw malformed(error.description)
    }
    self = try document.read { value throws(MooncakeError) in
      try ShardAnswer(parsing: value, shardCount: shardCount)
    }
  }

  private init(parsing value: JSONValue, shardCount: Int) throws(MooncakeError) {
    try StoreVersion.checkAnswer(value)
    guard let number = value["state"]?.unsigned, let state = State(rawValue: number) else {
      throw malformed("state")
    }
    self.init(
      state: state,
      granted: try parseShards(value["granted"], "granted", shardCount: shardCount),
      leaseMilliseconds: try parseNumber(
        value["lease_ms"], "lease_ms", upTo: ShardMessageLimits.milliseconds),
      retryMilliseconds: try parseNumber(
        value["retry_ms"], "retry_ms", upTo: ShardMessageLimits.milliseconds),
      heldCount: Int(try parseNumber(value["held"], "held", upTo: UInt64(shardCount))),
      readerCount: Int(
        try parseNumber(value["readers"], "readers", upTo: ShardMessageLimits.readerCount)),
      peers: try parsePeers(value["peers"]))
  }
}

extension HolderAddress {
  /// Writes it as an object.
  package func write(to writer: inout JSONWriter) {
    writer.beginObject()
    writer.member("holding", HexNumber.text(holding))
    writer.member("rpc", rpc)
    writer.member("segment", segment)
    writer.endObject()
  }

  /// Reads what `write` wrote.
  package init(parsing value: JSONValue) throws(MooncakeError) {
    self.init(
      holding: try parseHexadecimal(value["holding"], "holding"),
      rpc: try parseName(value["rpc"], "rpc"),
      segment: try parseName(value["segment"], "segment"))
  }
}

extension JSONWriter {
  fileprivate mutating func write(_ name: String, _ shards: [Int]) {
    self.name(name)
    beginArray()
    for shard in shards { value(UInt64(shard)) }
    endArray()
  }
}

private func malformed(_ what: String) -> MooncakeError {
  MooncakeError(.protocolViolation, "malformed message about shards: \(what)")
}

private func parseHexadecimal(_ value: JSONValue?, _ name: String) throws(MooncakeError) -> UInt64 {
  guard let number = value?.string.flatMap({ HexNumber.parse($0) }) else { throw malformed(name) }
  return number
}

private func parseNumber(
  _ value: JSONValue?, _ name: String, upTo limit: UInt64
) throws(MooncakeError) -> UInt64 {
  guard let number = value?.unsigned, number <= limit else { throw malformed(name) }
  return number
}

private func parseName(_ value: JSONValue?, _ name: String) throws(MooncakeError) -> String {
  guard let text = value?.string, (1...ShardMessageLimits.nameBytes).contains(text.utf8.count)
  else { throw malformed(name) }
  return text
}

private func parseShardSet(_ value: JSONValue?, shardCount: Int) throws(MooncakeError) -> ShardSet {
  guard let value else { return ShardSet(count: shardCount) }
  guard let bytes = value.string.flatMap(Base64.decode),
    let set = ShardSet(count: shardCount, bytes: bytes)
  else { throw malformed("have") }
  return set
}

private func parseShards(
  _ value: JSONValue?, _ name: String, shardCount: Int
) throws(MooncakeError) -> [Int] {
  guard let value else { return [] }
  guard value.isArray else { throw malformed(name) }
  var shards: [Int] = []
  for element in value.elements {
    guard shards.count < ShardMessageLimits.grantCount, let shard = element.unsigned,
      shard < UInt64(shardCount)
    else { throw malformed(name) }
    shards.append(Int(shard))
  }
  return shards
}

private func parsePeers(_ value: JSONValue?) throws(MooncakeError) -> [HolderAddress] {
  guard let value else { return [] }
  guard value.isArray else { throw malformed("peers") }
  var peers: [HolderAddress] = []
  for element in value.elements {
    if peers.count == ShardMessageLimits.peerCount { throw malformed("peers") }
    peers.append(try HolderAddress(parsing: element))
  }
  return peers
}
