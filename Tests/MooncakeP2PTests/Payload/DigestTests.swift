import CXXHash
import MooncakeP2P
import Testing

@Suite struct DigestTests {
  /// Bytes that repeat every 251, and their digests by the reference implementation.
  private static let vectors: [(count: Int, hexadecimal: String)] = [
    (0, "99aa06d3014798d86001c324468d497f"),
    (240, "65b5be86da5540e7c92b68e16f83bbb6"),
    (241, "1da1cb61bcb8a2a102e8cd95421c6d02"),
    (1000, "18bf41bc8229e27733ef703fb2b20ed1"),
    (1 << 20, "53738d98098cabba6e0d7ac36b8c10ff"),
  ]

  private static func bytes(_ count: Int) -> [UInt8] { (0..<count).map { UInt8($0 % 251) } }

  @Test func agreesWithTheReference() {
    for (count, hexadecimal) in Self.vectors {
      let digest = Self.bytes(count).withUnsafeBytes { Digest(of: $0) }
      #expect(PayloadVersion(digest).description == hexadecimal, "\(count) bytes")
    }
  }

  @Test func piecesMakeTheSameDigest() {
    for (count, hexadecimal) in Self.vectors {
      for step in [1000, 4096, 65_537] {
        let stream = DigestStream()
        Self.bytes(count).withUnsafeBytes { bytes in
          for start in stride(from: 0, to: count, by: step) {
            stream.update(UnsafeRawBufferPointer(rebasing: bytes[start..<min(start + step, count)]))
          }
        }
        #expect(PayloadVersion(stream.finish()).description == hexadecimal)
      }
    }
  }

  @Test func everyKernelMakesTheSameDigest() throws {
    for (count, hexadecimal) in Self.vectors {
      for usesAVX2 in [false, true] where !usesAVX2 || xxhash_has_avx2() != 0 {
        let state = try #require(xxhash_create())
        defer { xxhash_free(state) }
        xxhash_reset(state)
        if usesAVX2 {
          xxhash_update_avx2(state, Self.bytes(count), count)
        } else {
          xxhash_update(state, Self.bytes(count), count)
        }
        var digest = Digest(high: 0, low: 0)
        xxhash_digest(state, &digest.high, &digest.low)
        #expect(PayloadVersion(digest).description == hexadecimal)
      }
    }
  }
}
