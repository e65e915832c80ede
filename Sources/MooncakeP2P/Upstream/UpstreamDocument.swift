import MooncakeBase
import MooncakeEngine

/// What Mooncake's store keeps about a payload: everything in one value.
package struct UpstreamDocument: Equatable, Sendable {
  /// Where a shard is: an address in the memory of a segment's process.
  package struct Location: Hashable, Sendable {
    package var segment: String
    package var offset: UInt64

    package init(segment: String, offset: UInt64) {
      self.segment = segment
      self.offset = offset
    }
  }

  package struct Shard: Equatable, Sendable {
    package var size: UInt64
    /// Those who registered the payload.
    package var gold: [Location]
    /// Those who fetched it.
    package var replicas: [Location]
  }

  package var name: String
  package var layout: ShardLayout
  /// As many as the layout has.
  package var shards: [Shard]

  private static let maximumSegmentBytes = 1024

  /// The document of a process that has just registered a payload, with an address for each shard.
  package init(name: String, layout: ShardLayout, segment: String, addresses: [UInt64]) {
    self.name = name
    self.layout = layout
    shards = addresses.enumerated().map { index, address in
      Shard(
        size: layout.piece(ofShard: index).length,
        gold: [Location(segment: segment, offset: address)], replicas: [])
    }
  }

  package var size: UInt64 { layout.size }
  package var sizeList: [UInt64] { layout.bufferSizes }
  package var maxShardSize: UInt64 { layout.shardBytes }

  /// Where a shard begins in the payload.
  package func offset(of shard: Int) -> UInt64 { layout.payloadOffset(ofShard: shard) }

  /// Whether both describe the same buffers and shards, wherever they are.
  package func isSamePayload(as other: UpstreamDocument) -> Bool {
    name.utf8.elementsEqual(other.name.utf8) && layout == other.layout
  }

  /// Whether a later document describes the same registration, as far as can be seen: registering
  /// anew drops the replicas, so it goes unnoticed if there were none.
  package func isContinued(by later: UpstreamDocument) -> Bool {
    if self == later { return false }
    let replicas = zip(shards, later.shards).map { (Set($0.replicas), $1.replicas) }
    return replicas.allSatisfy { $0.0.isEmpty }
      || replicas.contains { former, now in now.contains { former.contains($0) } }
  }

  /// Everyone who has some of it, listed once, owners first.
  package var holders: [PayloadHolder] {
    var order: [String] = []
    var counts: [String: (gold: Int, all: Int)] = [:]
    for shard in shards {
      let gold = Set(shard.gold.map(\.segment))
      for segment in gold.union(shard.replicas.map(\.segment)) {
        if counts[segment] == nil { order.append(segment) }
        counts[segment, default: (0, 0)].all += 1
        if gold.contains(segment) { counts[segment]?.gold += 1 }
      }
    }
    let holders = order.map { segment in
      let count = counts[segment] ?? (0, 0)
      return PayloadHolder(
        segment: segment, version: nil, isOrigin: count.gold > 0,
        isComplete: count.all == shards.count)
    }
    return holders.filter(\.isOrigin) + holders.filter { !$0.isOrigin }
  }

  /// What callers of the store see.
  package var info: PayloadInfo {
    PayloadInfo(
      name: name, version: nil, size: size, shardBytes: maxShardSize,
      shardCount: UInt64(shards.count), bufferSizes: sizeList,
      holderCount: UInt64(holders.count))
  }

  /// Whether nobody is listed for any shard.
  var isOrphaned: Bool { shards.allSatisfy { $0.gold.isEmpty && $0.replicas.isEmpty } }
}

extension UpstreamDocument {
  /// As Mooncake writes it.
  package var json: String {
    var writer = JSONWriter()
    writer.reserve(256 + shards.count * 160)
    writer.beginObject()
    writer.member("name", name)
    writer.member("size", size)
    writer.name("size_list")
    writer.beginArray()
    for size in sizeList { writer.value(size) }
    writer.endArray()
    writer.member("max_shard_size", maxShardSize)
    writer.name("shards")
    writer.beginArray()
    for shard in shards {
      writer.beginObject()
      writer.member("size", shard.size)
      Self.write("gold", shard.gold, &writer)
      Self.write("replica_list", shard.replicas, &writer)
      writer.endObject()
    }
    writer.endArray()
    writer.endObject()
    return writer.text
  }

  private static func write(
    _ name: String, _ locations: [Location], _ writer: inout JSONWriter
  ) {
    writer.name(name)
    writer.beginArray()
    for location in locations {
      writer.beginObject()
      writer.member("segment_name", location.segment)
      writer.member("offset", location.offset)
      writer.endObject()
    }
    writer.endArray()
  }

  /// Reads a document that anybody may have written.
  package init(json: String) throws(MooncakeError) {
    self = try PayloadSummary.read(json) { value throws(MooncakeError) in
      try UpstreamDocument(parsing: value)
    }
  }

  private init(parsing value: JSONValue) throws(MooncakeError) {
    guard let name = value["name"]?.string, PayloadName.fault(name) == nil else {
      throw PayloadSummary.malformed("name")
    }
    var sizes: [UInt64] = []
    for element in try Self.elements(value, "size_list", ShardLayout.maximumBufferCount) {
      guard let size = element.unsigned else { throw PayloadSummary.malformed("size_list") }
      sizes.append(size)
    }
    let layout = try ShardLayout(
      bufferSizes: sizes,
      shardBytes: try PayloadSummary.number(
        value, "max_shard_size", upTo: ShardLayout.maximumShardBytes),
      failure: .protocolViolation)
    if try PayloadSummary.number(value, "size", upTo: .max) != layout.size {
      throw PayloadSummary.malformed("size is not the sum of size_list")
    }
    var shards: [Shard] = []
    for element in try Self.elements(value, "shards", layout.shardCount) {
      let size = try PayloadSummary.number(element, "size", upTo: layout.shardBytes)
      if size != layout.piece(ofShard: shards.count).length {
        throw PayloadSummary.malformed("size of shard \(shards.count)")
      }
      shards.append(
        Shard(
          size: size, gold: try Self.locations(element, "gold"),
          replicas: try Self.locations(element, "replica_list")))
    }
    if shards.count != layout.shardCount {
      throw PayloadSummary.malformed("\(shards.count) shards instead of \(layout.shardCount)")
    }
    self.name = name
    self.layout = layout
    self.shards = shards
  }

  /// A list; a missing one is empty.
  private static func elements(
    _ value: JSONValue, _ name: String, _ limit: Int
  ) throws(MooncakeError) -> JSONElements {
    guard let list = value[name], !list.isNull else { return .none }
    var count = 0
    for _ in list.elements { count += 1 }
    if !list.isArray || count > limit { throw PayloadSummary.malformed(name) }
    return list.elements
  }

  private static func locations(
    _ value: JSONValue, _ name: String
  ) throws(MooncakeError) -> [Location] {
    var locations: [Location] = []
    for element in try elements(value, name, .max) {
      guard let segment = element["segment_name"]?.string,
        (1...maximumSegmentBytes).contains(segment.utf8.count)
      else { throw PayloadSummary.malformed("segment_name") }
      locations.append(
        Location(
          segment: segment, offset: try PayloadSummary.number(element, "offset", upTo: .max)))
    }
    return locations
  }
}
