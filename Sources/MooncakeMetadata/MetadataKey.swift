import Glibc

/// A key or name compared by its bytes: Swift would call some different texts equal.
package struct MetadataKey: Hashable, Comparable, Sendable {
  package let text: String

  package init(_ text: String) { self.text = text }

  package static func == (left: MetadataKey, right: MetadataKey) -> Bool {
    order(left, right) == 0
  }

  package static func < (left: MetadataKey, right: MetadataKey) -> Bool {
    order(left, right) < 0
  }

  /// Negative if the left one comes first, zero if they are equal.
  private static func order(_ left: MetadataKey, _ right: MetadataKey) -> Int {
    left.withBytes { left in
      right.withBytes { right in
        let count = min(left.count, right.count)
        if count > 0, let left = left.baseAddress, let right = right.baseAddress {
          let order = memcmp(left, right, count)
          if order != 0 { return Int(order) }
        }
        return left.count - right.count
      }
    }
  }

  /// Keys in order. Most share a prefix, so the bytes after it are compared as numbers that lie
  /// side by side in memory; following pointers to the texts takes several times as long.
  package static func sorted(_ keys: some Sequence<MetadataKey>) -> [MetadataKey] {
    let keys = Array(keys)
    guard let first = keys.first else { return [] }
    let common = first.withBytes { first in
      keys.reduce(first.count) { count, key in
        key.withBytes { key in
          let count = min(count, key.count)
          return (0..<count).first { first[$0] != key[$0] } ?? count
        }
      }
    }
    var places = keys.indices.map { Place(keys[$0], $0, behind: common) }
    places.sort {
      $0.first != $1.first
        ? $0.first < $1.first
        : $0.second != $1.second ? $0.second < $1.second : keys[$0.index] < keys[$1.index]
    }
    return places.map { keys[$0.index] }
  }

  /// A key's index in the list and the sixteen bytes after the common prefix, padded with zeros.
  private struct Place {
    let first: UInt64
    let second: UInt64
    let index: Int

    init(_ key: MetadataKey, _ index: Int, behind common: Int) {
      self.index = index
      (first, second) = key.withBytes { bytes in
        var words: (UInt64, UInt64) = (0, 0)
        withUnsafeMutableBytes(of: &words) {
          $0.copyBytes(from: bytes[common...].prefix($0.count))
        }
        return (words.0.bigEndian, words.1.bigEndian)
      }
    }
  }

  package func hash(into hasher: inout Hasher) {
    withBytes { hasher.combine(bytes: UnsafeRawBufferPointer($0)) }
  }

  /// Runs `body` with the bytes themselves. String views take several times as long, and so does a
  /// copy of the text, because of reference counting.
  private func withBytes<Result>(_ body: (UnsafeBufferPointer<UInt8>) -> Result) -> Result {
    if let result = text.utf8.withContiguousStorageIfAvailable(body) { return result }
    return Array(text.utf8).withUnsafeBufferPointer(body)
  }
}
