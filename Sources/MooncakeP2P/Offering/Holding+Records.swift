import MooncakeSystem

extension Holding {
  /// The entry for the metadata service.
  var summary: PayloadSummary {
    PayloadSummary(
      name: name, version: version, size: manifest.layout.size,
      shardBytes: manifest.layout.shardBytes, shardCount: UInt64(manifest.layout.shardCount),
      bufferCount: UInt64(manifest.layout.bufferSizes.count),
      publishedMilliseconds: publishedMilliseconds, isWritable: manifest.isWritable)
  }

  /// The present state, for the metadata service.
  var record: HolderRecord {
    HolderRecord(summary, holder: address, isOrigin: isOrigin, isComplete: isComplete)
  }

  /// The address of each shard.
  var shardAddresses: [UInt64] {
    (0..<manifest.layout.shardCount).map { shard in
      let range = manifest.layout.range(ofShard: shard)
      return layout.address(of: range.offset, length: range.length) ?? 0
    }
  }

  /// For Mooncake's own store, with this process as the only owner.
  var document: UpstreamDocument {
    UpstreamDocument(
      name: name, layout: manifest.layout, segment: address.segment, addresses: shardAddresses)
  }

  func info(holderCount: UInt64) -> PayloadInfo {
    var info = summary.info(holderCount: holderCount)
    info.bufferSizes = manifest.layout.bufferSizes
    return info
  }
}
