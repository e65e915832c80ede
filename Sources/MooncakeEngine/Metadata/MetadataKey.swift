/// A key or a name as the bytes it is made of: texts that only look alike are different ones.
package struct MetadataKey: Hashable, Comparable, Sendable {
  package let text: String

  package init(_ text: String) { self.text = text }

  package static func == (left: MetadataKey, right: MetadataKey) -> Bool {
    compare(left, right) { $0.elementsEqual($1) }
  }

  package static func < (left: MetadataKey, right: MetadataKey) -> Bool {
    compare(left, right) { $0.lexicographicallyPrecedes($1) }
  }

  /// On the bytes themselves: going through the views of texts takes several times as long.
  private static func compare(
    _ left: MetadataKey, _ right: MetadataKey,
    _ body: (UnsafeBufferPointer<UInt8>, UnsafeBufferPointer<UInt8>) -> Bool
  ) -> Bool {
    var (left, right) = (left.text, right.text)
    return left.withUTF8 { left in right.withUTF8 { right in body(left, right) } }
  }

  package func hash(into hasher: inout Hasher) {
    var text = text
    text.withUTF8 { hasher.combine(bytes: UnsafeRawBufferPointer($0)) }
  }
}
