// Results of store calls as C reads them: structs and texts in their own memory.
import CMooncake
import MooncakeEngine
import MooncakeP2P

/// Memory for C to read, freed with this object.
final class CMemory: @unchecked Sendable {
  // Unchecked: filled before a second thread sees it.
  private var blocks: [UnsafeMutableRawPointer] = []

  deinit { for block in blocks { block.deallocate() } }

  func value<Value>(_ value: Value) -> UnsafePointer<Value> {
    let block = UnsafeMutablePointer<Value>.allocate(capacity: 1)
    block.initialize(to: value)
    blocks.append(UnsafeMutableRawPointer(block))
    return UnsafePointer(block)
  }

  /// nil for none.
  func array<Element>(_ elements: [Element]) -> UnsafeMutablePointer<Element>? {
    if elements.isEmpty { return nil }
    let block = UnsafeMutableBufferPointer<Element>.allocate(capacity: elements.count)
    _ = block.initialize(from: elements)
    blocks.append(UnsafeMutableRawPointer(block.baseAddress!))
    return block.baseAddress
  }

  /// NUL-terminated; nil for nil.
  func text(_ text: String?) -> UnsafePointer<CChar>? {
    text.flatMap { UnsafePointer(array(Array($0.utf8CString))) }
  }

  func info(_ info: PayloadInfo) -> UnsafePointer<mooncake_payload_info_t> {
    value(
      mooncake_payload_info_t(
        name: text(info.name), version: text(info.version?.description), size: info.size,
        shard_bytes: info.shardBytes, shard_count: info.shardCount,
        buffer_count: UInt64(info.bufferSizes.count),
        buffer_sizes: UnsafePointer(array(info.bufferSizes)), holder_count: info.holderCount,
        published_ms: info.publishedMilliseconds, is_writable: info.isWritable ? 1 : 0,
        reserved: 0))
  }
}

/// The object behind a `mooncake_store_result_t`.
final class StoreReport: HandleObject, @unchecked Sendable {
  // Unchecked: written only while it is created.
  static var noun: StaticString { "a result" }
  static var capacity: Int { 1 << 20 }

  private let memory: CMemory
  let contents: UnsafePointer<mooncake_store_report_t>

  init(payloads: [PayloadInfo], holders: [PayloadHolder] = []) {
    let memory = CMemory()
    var report = mooncake_store_report_t()
    memory.fill(&report, payloads: payloads)
    let holders = holders.map { holder in
      UnsafePointer?(
        memory.value(
          mooncake_payload_holder_t(
            segment: memory.text(holder.segment),
            version: memory.text(holder.version?.description),
            is_origin: holder.isOrigin ? 1 : 0, is_complete: holder.isComplete ? 1 : 0)))
    }
    report.holder_count = UInt64(holders.count)
    report.holders = UnsafePointer(memory.array(holders))
    contents = memory.value(report)
    self.memory = memory
  }

  init(_ result: GetResult) {
    let memory = CMemory()
    var report = mooncake_store_report_t()
    memory.fill(&report, payloads: [result.info])
    let buffers = result.buffers.map {
      mooncake_buffer_t(address: $0.address, length: $0.length)
    }
    report.buffer_count = UInt64(buffers.count)
    report.buffers = UnsafePointer(memory.array(buffers))
    let sources = result.sources.map { source in
      UnsafePointer?(
        memory.value(
          mooncake_payload_source_t(
            segment: memory.text(source.segment), bytes: source.byteCount,
            corrupt_shard_count: source.corruptShardCount, is_origin: source.isOrigin ? 1 : 0,
            reserved: 0)))
    }
    report.source_count = UInt64(sources.count)
    report.sources = UnsafePointer(memory.array(sources))
    report.duration_ns = result.nanoseconds
    report.is_verified = result.isVerified ? 1 : 0
    contents = memory.value(report)
    self.memory = memory
  }
}

extension CMemory {
  fileprivate func fill(_ report: inout mooncake_store_report_t, payloads: [PayloadInfo]) {
    let payloads = payloads.map { UnsafePointer?(info($0)) }
    report.payload_count = UInt64(payloads.count)
    report.payloads = UnsafePointer(array(payloads))
  }
}
