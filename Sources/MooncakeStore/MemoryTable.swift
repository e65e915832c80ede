import MooncakeEngine
import MooncakeSystem
import Synchronization

/// The memory that holdings of one store have registered with its engine. Several holdings may use
/// the same ranges; they stay registered until the last one lets go.
final class MemoryTable: Sendable {
  private struct Entry {
    var length: UInt64
    var access: Access
    var useCount = 1
  }
  private let engine: TransferEngine
  private let entries = Lock<[UInt64: Entry]>([:])

  /// Memory that is no payload any more while a peer still has a grant to write into it.
  private struct LateWrites {
    var buffers: [BufferLayout.Buffer]
    var end: UInt64
  }
  private let lateWrites = Lock<[LateWrites]>([])

  init(_ engine: TransferEngine) { self.engine = engine }

  /// Registers all buffers or none, and waits within the call until peers can find them.
  func register(
    _ buffers: [BufferLayout.Buffer], location: String, access: Access, _ call: MetadataCall
  ) throws(EngineError) {
    try enter(buffers, location: location, access: access)
    if access == .local { return }
    do throws(EngineError) {
      // Not under the lock: others would wait beyond their own deadlines.
      try engine.publishChanges(call)
    } catch {
      unregister(buffers, .background)
      throw EngineError(
        error.code,
        "registering \(buffers.count) buffer(s), none of which remains: \(error.message)")
    }
  }

  private func enter(
    _ buffers: [BufferLayout.Buffer], location: String, access: Access
  ) throws(EngineError) {
    try entries.withLock { entries throws(EngineError) in
      var new: [(address: UInt64, length: UInt64)] = []
      var shared: [UInt64] = []
      for buffer in buffers {
        guard let entry = entries[buffer.address] else {
          new.append((buffer.address, buffer.length))
          continue
        }
        guard entry.length == buffer.length, entry.access == access else {
          throw EngineError(
            .overlap,
            "0x\(String(buffer.address, radix: 16)): another payload of this store has registered "
              + "\(entry.length) bytes there, not the same \(buffer.length) with the same access")
        }
        shared.append(buffer.address)
      }
      if !new.isEmpty {
        do {
          try new.withUnsafeBufferPointer { ranges in
            try engine.register(
              ranges, location: location, access: access, publishing: .background)
          }
        } catch let error as EngineError {
          throw error
        } catch {
          throw EngineError(.system, "\(error)")
        }
      }
      for range in new { entries[range.address] = Entry(length: range.length, access: access) }
      for address in shared { entries[address]!.useCount += 1 }
    }
  }

  /// Buffers that are about to be let go may be written to until then, by peers that have a grant.
  func expectWrites(to buffers: [BufferLayout.Buffer], until end: UInt64) {
    let now = Clock.now()
    lateWrites.withLock { lateWrites in
      lateWrites.removeAll { $0.end <= now }
      if end > now { lateWrites.append(LateWrites(buffers: buffers, end: end)) }
    }
  }

  /// From when on none of these buffers may be written to by peers that had a grant for a former
  /// payload there: before that, the write would land in the new one.
  func endOfLateWrites(to buffers: [BufferLayout.Buffer]) -> UInt64 {
    lateWrites.withLock { lateWrites in
      var end: UInt64 = 0
      for late in lateWrites where late.end > end {
        if BufferLayout.overlap(late.buffers, buffers) { end = late.end }
      }
      return end
    }
  }

  /// Lets go of buffers; when this returns, nobody reads those that no other holding uses.
  func unregister(_ buffers: [BufferLayout.Buffer], _ call: MetadataCall) {
    let isChanged = entries.withLock { entries in
      var last: [UInt64] = []
      for buffer in buffers {
        guard var entry = entries[buffer.address] else { continue }
        entry.useCount -= 1
        entries[buffer.address] = entry.useCount == 0 ? nil : entry
        if entry.useCount == 0 { last.append(buffer.address) }
      }
      if last.isEmpty { return false }
      do {
        try last.withUnsafeBufferPointer { try engine.unregister($0, publishing: .background) }
      } catch {
        // The engine has closed, and with it nobody reads any more; or it has logged who does.
        Log.debug("store: unregistering memory: \(error)")
      }
      return true
    }
    if isChanged { try? engine.publishChanges(call) }
  }
}
