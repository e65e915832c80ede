import MooncakeBase
import MooncakeEngine

/// What the metadata service knows about a version of a payload; the rest is in its manifest.
package struct PayloadSummary: Equatable, Sendable {
  package var name: String
  package var version: PayloadVersion
  /// Bytes of all buffers.
  package var size: UInt64
  package var shardBytes: UInt64
  package var shardCount: UInt64
  package var bufferCount: UInt64
  package var publishedMilliseconds: UInt64
  package var isWritable: Bool

  package init(
    name: String, version: PayloadVersion, size: UInt64, shardBytes: UInt64, shardCount: UInt64,
    bufferCount: UInt64, publishedMilliseconds: UInt64, isWritable: Bool
  ) {
    self.name = name
    self.version = version
    self.size = size
    self.shardBytes = shardBytes
    self.shardCount = shardCount
    self.bufferCount = bufferCount
    self.publishedMilliseconds = publishedMilliseconds
    self.isWritable = isWritable
  }

  /// What callers of the store see.
  package func info(holderCount: UInt64) -> PayloadInfo {
    PayloadInfo(
      name: name, version: version, size: size, shardBytes: shardBytes, shardCount: shardCount,
      publishedMilliseconds: publishedMilliseconds, isWritable: isWritable,
      holderCount: holderCount)
  }

  func write(to writer: inout JSONWriter) {
    writer.storeVersion()
    writer.member("name", name)
    writer.member("version", version.description)
    writer.member("size", size)
    writer.member("shard_bytes", shardBytes)
    writer.member("shards", shardCount)
    writer.member("buffers", bufferCount)
    writer.member("published_ms", publishedMilliseconds)
    writer.name("writable")
    writer.value(isWritable)
  }

  init(parsing value: JSONValue) throws(MooncakeError) {
    guard let name = value["name"]?.string, PayloadName.fault(name) == nil else {
      throw Self.malformed("name")
    }
    guard let version = value["version"]?.string.flatMap({ PayloadVersion($0) }) else {
      throw Self.malformed("version")
    }
    let size = try Self.number(value, "size", upTo: .max)
    let shardCount = try Self.number(value, "shards", upTo: UInt64(ShardLayout.maximumShardCount))
    let shardBytes = try Self.number(value, "shard_bytes", upTo: ShardLayout.maximumShardBytes)
    // Impossible counts would mislead callers that plan with them.
    if shardCount.multipliedReportingOverflow(by: shardBytes).overflow
      || shardCount * shardBytes < size
    {
      throw Self.malformed("size")
    }
    self.init(
      name: name, version: version, size: size, shardBytes: shardBytes, shardCount: shardCount,
      bufferCount: try Self.number(
        value, "buffers", upTo: UInt64(ShardLayout.maximumBufferCount)),
      publishedMilliseconds: try Self.number(value, "published_ms", upTo: .max),
      isWritable: value["writable"]?.isTrue ?? false)
  }

  static func number(
    _ value: JSONValue, _ name: String, upTo limit: UInt64
  ) throws(MooncakeError) -> UInt64 {
    guard let number = value[name]?.unsigned, number <= limit else { throw malformed(name) }
    return number
  }

  static func malformed(_ what: String) -> MooncakeError {
    MooncakeError(.protocolViolation, "malformed record of a payload: \(what)")
  }

  static func read<Result>(
    _ text: String, _ body: (JSONValue) throws(MooncakeError) -> Result
  ) throws(MooncakeError) -> Result {
    let document: JSONDocument
    do throws(JSONError) {
      document = try JSONDocument(parsing: text)
    } catch {
      throw malformed(error.description)
    }
    return try document.read { value throws(MooncakeError) in
      try StoreVersion.check(value, "the record of a payload")
      return try body(value)
    }
  }
}
