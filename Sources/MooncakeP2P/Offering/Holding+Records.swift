import MooncakeSystem

extension Holding {
  /// What the metadata service is to know.
  var summary: PayloadSummary {
    PayloadSummary(
      name: name, version: version, size: manifest.layout.size,
      shardBytes: manifest.layout.shardBytes, shardCount: UInt64(manifest.layout.shardCount),
      bufferCount: UInt64(manifest.layout.bufferSizes.count),
      publishedMilliseconds: publishedMilliseconds, isWritable: manifest.isWritable)
  }

  /// As it stands now.
  var record: HolderRecord {
    HolderRecord(summary, holder: address, isOrigin: isOrigin, isComplete: isComplete)
  }

  /// Where each shard is.
  var shardAddresses: [UInt64] {
    (0..<manifest.layout.shardCount).map { shard in
      let range = manifest.layout.range(ofShard: shard)
      return layout.address(of: range.offset, length: range.length) ?? 0
    }
  }

  /// For the existing system, with this process as the only owner.
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
