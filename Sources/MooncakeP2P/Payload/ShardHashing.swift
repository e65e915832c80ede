import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Computes the digests of many shards on several threads.
package enum ShardHashing {
  /// Reads the bytes of a shard and returns their digest; called on several threads. Shards can be
  /// gigabytes, so it calls the given closure every few megabytes, and stops if that throws.
  package typealias Source =
    @Sendable (ShardLayout.Piece, () throws(MooncakeError) -> Void) throws(MooncakeError) -> Digest

  private struct State {
    var next = 0
    var doneBytes: UInt64 = 0
    var digests: [Digest]
    var failure: MooncakeError?
  }

  private final class Work: Sendable {
    let state: Lock<State>
    let layout: ShardLayout
    let source: Source

    init(_ layout: ShardLayout, _ source: @escaping Source) {
      self.layout = layout
      self.source = source
      state = Lock(
        State(digests: Array(repeating: Digest(high: 0, low: 0), count: layout.shardCount)))
    }

    /// Throws once another thread has failed.
    func goOn() throws(MooncakeError) {
      if let failure = state.withLock({ $0.failure }) { throw failure }
    }

    /// Hashes shards until none is left. `pause` gets the number of bytes done so far and may stop
    /// the work by throwing.
    func run(pause: (UInt64) throws(MooncakeError) -> Void) {
      while true {
        let index: Int? = state.withLock { state in
          guard state.next < layout.shardCount, state.failure == nil else { return nil }
          defer { state.next += 1 }
          return state.next
        }
        guard let index else { return }
        do throws(MooncakeError) {
          let piece = layout.piece(ofShard: index)
          let digest = try source(piece) { () throws(MooncakeError) in
            try goOn()
            try pause(state.withLock { $0.doneBytes })
          }
          let done = state.withLock { state in
            state.digests[index] = digest
            state.doneBytes += piece.length
            return state.doneBytes
          }
          try pause(done)
        } catch {
          state.withLock { if $0.failure == nil { $0.failure = error } }
        }
      }
    }
  }

  /// Below this, starting threads costs more than it saves.
  private static let parallelBytes: UInt64 = 64 << 20
  private static let threadLimit = 8

  /// Runs on the caller's thread, and on more threads for large payloads.
  package static func run(
    _ layout: ShardLayout, _ bounds: Bounds, _ source: @escaping Source
  ) throws(MooncakeError) -> [Digest] {
    try bounds.report(.hashing, StoreProgress(.hashing, totalBytes: layout.size))
    let work = Work(layout, source)
    let threads =
      layout.size < parallelBytes ? 1 : min(threadLimit, Processors.count, layout.shardCount)
    let helpers = WorkerPool(name: "mc-store-hash", threadLimit: max(1, threads - 1))
    for _ in 1..<max(1, threads) { _ = helpers.run { work.run { _ in } } }
    work.run { done throws(MooncakeError) in
      try bounds.check("hashing")
      try bounds.report(
        .hashing, StoreProgress(.hashing, doneBytes: done, totalBytes: layout.size))
    }
    helpers.stop()
    let (digests, failure) = work.state.withLock { ($0.digests, $0.failure) }
    if let failure { throw failure }
    return digests
  }
}
