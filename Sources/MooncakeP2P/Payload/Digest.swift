import CXXHash
import MooncakeBase
import MooncakeEngine

/// XXH3-128 of some bytes: finds damage and mix-ups, not forgery.
package struct Digest: Hashable, Sendable {
  package var high: UInt64
  package var low: UInt64

  package init(high: UInt64, low: UInt64) {
    self.high = high
    self.low = low
  }

  /// Hashes a range of memory.
  package init(of bytes: UnsafeRawBufferPointer) {
    let stream = DigestStream()
    stream.update(bytes)
    self = stream.finish()
  }

  private static let stepBytes = 4 << 20

  /// Hashes a range of memory step by step; `pause`, called between steps, may stop it by throwing.
  package init(
    of bytes: UnsafeRawBufferPointer, pause: () throws(MooncakeError) -> Void
  ) throws(MooncakeError) {
    let stream = DigestStream()
    var start = 0
    while start < bytes.count {
      if start > 0 { try pause() }
      let end = start + min(Self.stepBytes, bytes.count - start)
      stream.update(UnsafeRawBufferPointer(rebasing: bytes[start..<end]))
      start = end
    }
    self = stream.finish()
  }
}

/// Hashes bytes that arrive in pieces.
package struct DigestStream: ~Copyable {
  private let state: OpaquePointer

  package init() {
    guard let state = xxhash_create() else { fatalError("no memory for 576 bytes") }
    self.state = state
    xxhash_reset(state)
  }

  deinit { xxhash_free(state) }

  /// Adds the next bytes.
  package borrowing func update(_ bytes: UnsafeRawBufferPointer) {
    guard let start = bytes.baseAddress else { return }
    if Self.usesAVX2 {
      xxhash_update_avx2(state, start, bytes.count)
    } else {
      xxhash_update(state, start, bytes.count)
    }
  }

  /// The digest of all bytes added.
  package borrowing func finish() -> Digest {
    var digest = Digest(high: 0, low: 0)
    xxhash_digest(state, &digest.high, &digest.low)
    return digest
  }

  private static let usesAVX2 = xxhash_has_avx2() != 0

  /// Initializes the global once: see `Fork.prepare`.
  package static func prepare() { _ = usesAVX2 }
}

extension PayloadVersion {
  /// The version whose manifest has this digest.
  package init(_ digest: Digest) { self.init(high: digest.high, low: digest.low) }
}
