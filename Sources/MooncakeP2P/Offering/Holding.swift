import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// A payload, or part of one, in this process's memory, as others see it.
package final class Holding: Sendable {
  package let name: String
  package let address: HolderAddress
  package let manifest: Manifest
  package let layout: BufferLayout
  package let isOrigin: Bool
  package let publishedMilliseconds: UInt64
  /// Manifest and table of buffers, in memory that peers read and the engine frees.
  let index: UInt64
  private let engine: TransferEngine

  private struct State {
    var ledger: UploadLedger
    var available: ShardSet
    var isWithdrawn = false
    var readBytes: UInt64 = 0
  }
  private let state: Lock<State>

  /// Offers nothing yet but what is available. The caller registers the payload's memory, which
  /// publishes the memory of the index too.
  package init(
    name: String, _ engine: TransferEngine, _ manifest: Manifest, _ layout: BufferLayout,
    available: ShardSet, isOrigin: Bool, publishedMilliseconds: UInt64
  ) throws(MooncakeError) {
    self.name = name
    self.engine = engine
    self.manifest = manifest
    self.layout = layout
    self.isOrigin = isOrigin
    self.publishedMilliseconds = publishedMilliseconds
    let holding = UInt64.random(in: 1 ... .max)
    address = HolderAddress(
      holding: holding, rpc: engine.rpcAddress.description, segment: engine.name)
    state = Lock(
      State(
        ledger: UploadLedger(shardCount: manifest.layout.shardCount, seed: holding),
        available: available))
    let bytes = manifest.bytes
    let length = UInt64(bytes.count + layout.buffers.count * Self.rowBytes)
    let memory = try engine.allocate(length: length, location: "*")
    index = UInt64(UInt(bitPattern: memory))
    bytes.withUnsafeBytes { memory.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
    for (row, buffer) in layout.buffers.enumerated() {
      let place = memory + bytes.count + row * Self.rowBytes
      place.storeBytes(of: buffer.address.littleEndian, as: UInt64.self)
      place.storeBytes(of: buffer.length.littleEndian, toByteOffset: 8, as: UInt64.self)
    }
    do throws(MooncakeError) {
      try engine.addBuffers([(index, length)], location: "*", access: .remoteRead)
    } catch {
      // It throws that this is not registered, but frees it.
      try? engine.free(memory)
      throw error
    }
  }

  /// Bytes of one table row: a buffer's address and length.
  package static let rowBytes = 16

  package var version: PayloadVersion { manifest.version }
  package var isComplete: Bool { state.withLock { $0.available.isFull } }

  /// Bytes of the shards that readers have returned after reading them, by whatever transport.
  package var readBytes: UInt64 { state.withLock { $0.readBytes } }

  /// Offers a shard from now on: its bytes are there and verified.
  package func offer(_ shard: Int) { state.withLock { $0.available.insert(shard) } }

  package func offers(_ shards: Range<Int>) -> Bool {
    state.withLock { state in
      !state.isWithdrawn && shards.allSatisfy { state.available.contains($0) }
    }
  }

  // MARK: Calls

  /// What a peer needs to know before it reads this.
  package func answerOpen() -> String {
    let (held, isWithdrawn) = state.withLock { ($0.available.memberCount, $0.isWithdrawn) }
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("state", isWithdrawn ? ShardAnswer.State.gone.rawValue : 0)
    writer.storeVersion()
    writer.member("version", version.description)
    writer.member("manifest_address", index)
    writer.member("manifest_bytes", UInt64(manifest.bytes.count))
    writer.member("table_address", index + UInt64(manifest.bytes.count))
    writer.member("buffers", UInt64(layout.buffers.count))
    writer.member("held", UInt64(held))
    writer.endObject()
    return writer.text
  }

  package func answer(_ request: ShardRequest) -> ShardAnswer {
    if request.version != version { return ShardAnswer(state: .gone) }
    return state.withLock { state in
      let answer = state.ledger.answer(request, available: state.available, now: Clock.now())
      for shard in state.ledger.returned {
        state.readBytes &+= manifest.layout.range(ofShard: shard).length
      }
      return answer
    }
  }

  // MARK: End

  /// Neither grants nor extends grants until `resumeGranting`; peers ask again.
  func pauseGranting() { state.withLock { $0.ledger.isPaused = true } }

  func resumeGranting() { state.withLock { $0.ledger.isPaused = false } }

  /// Grants nothing from now on.
  package func stopGranting() {
    state.withLock { state in
      state.isWithdrawn = true
      state.ledger.withdraw()
    }
  }

  /// Grants that are neither returned nor expired.
  package var grantCount: Int {
    state.withLock { $0.ledger.outstandingCount(now: Clock.now()) }
  }

  /// When the last grant expires, if none is given back; 0 without grants.
  package var lastGrantExpiry: UInt64 { state.withLock { $0.ledger.lastExpiry } }

  /// Stops granting and waits until all grants are returned or the deadline passes. Returns whether
  /// any are left.
  package func drain(until deadline: Deadline, _ bounds: Bounds? = nil) -> Bool {
    stopGranting()
    while grantCount > 0 {
      if deadline.hasPassed || bounds?.isOver == true { return true }
      // A caller that has canceled does not wait for readers.
      do throws(MooncakeError) {
        try bounds?.report(.draining, StoreProgress(.draining))
      } catch {
        return true
      }
      sleepBriefly(nanoseconds: 2_000_000)
    }
    return false
  }
}
