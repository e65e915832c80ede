import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Synchronization
import Testing

/// Gets of payloads that Mooncake's store registered, while their document changes.
@Suite(.enabled(if: ServiceProcess.Kind.etcd.isInstalled, "etcd is not installed"))
struct UpstreamGetTests {
  private static let size: UInt64 = 1 << 20

  private func bytes(_ result: GetResult) -> UInt64 {
    result.sources.reduce(0) { $0 + $1.byteCount }
  }

  @Test func whatIsRegisteredAnewMeanwhileIsReadAgain() throws {
    let service = try ServiceProcess(.etcd)
    let owner = try TransferEngine(SlowLink.options(service.uri))
    let link = try SlowLink(to: owner, bytesPerSecond: 2 << 20)
    defer {
      link.stop()
      owner.close()
    }
    let model = Memory(Int(Self.size), seed: 1)
    let base = UInt64(UInt(bitPattern: model.bytes.baseAddress!))
    try owner.register(model.bytes.baseAddress!, length: Self.size, access: .remoteRead)
    let document = UpstreamDocument(
      name: "m", layout: try ShardLayout(bufferSizes: [Self.size], shardBytes: 256 << 10),
      segment: owner.name, addresses: (0..<4).map { base + $0 << 18 })
    let directory = try service.directory()
    let catalog = try #require(UpstreamCatalog(directory))
    try catalog.put(document, isCreateOnly: true, testCall)

    var options = TransferEngine.Options()
    options.metadataURI = service.uri
    options.transports = ["tcp"]
    options.name = "receiver"
    let receiver = try P2PStore(engineOptions: options)
    let memory = Memory(Int(Self.size))
    var alone = GetOptions()
    alone.sharesOnward = false
    // Nobody changes it: one read suffices.
    let first = try receiver.get("m", into: [memory.buffer], alone)
    #expect(memory.holds(model) && !first.isVerified && bytes(first) == Self.size)
    try receiver.deleteReplica("m")

    // The same text, written again: its owner may have refilled the memory.
    let isDone = Atomic(false)
    var operation = StoreOperation(timeoutMilliseconds: 30_000)
    let before = link.dataBytes
    operation.progress = { progress in
      guard progress.phase == .transferring, link.dataBytes > before + Self.size / 2,
        !isDone.exchange(true, ordering: .acquiringAndReleasing)
      else { return true }
      do {
        try catalog.put(document, isCreateOnly: false, testCall)
        for index in 0..<model.bytes.count { model.bytes[index] ^= 0x5A }
      } catch {
        Issue.record("\(error)")
      }
      return true
    }
    let second = try receiver.get("m", into: [memory.buffer], alone, operation)
    let hasChanged = isDone.load(ordering: .acquiring)
    #expect(hasChanged && memory.holds(model) && bytes(second) == 2 * Self.size)
    try receiver.deleteReplica("m")
    receiver.close()
  }
}
