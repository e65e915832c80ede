import Glibc

/// The line in which a trainer says where its model is:
/// `segment NAME buffer ADDRESS LENGTH sha256 HASH`.
public struct Offer: CustomStringConvertible {
  public var segmentName: String
  public var address: UInt64
  public var length: UInt64
  public var hash: String

  public init(segmentName: String, address: UInt64, length: UInt64, hash: String) {
    self.segmentName = segmentName
    self.address = address
    self.length = length
    self.hash = hash
  }

  public init?(line: String) {
    let words = line.split(whereSeparator: \.isWhitespace)
    guard words.count == 7, words[0] == "segment", words[2] == "buffer", words[5] == "sha256",
      words[3].hasPrefix("0x"), let address = UInt64(words[3].dropFirst(2), radix: 16),
      let length = UInt64(words[4]), length > 0
    else { return nil }
    self.init(
      segmentName: String(words[1]), address: address, length: length, hash: String(words[6]))
  }

  /// Reads the line from a file that a trainer has written.
  public init(path: String) throws(ExampleError) {
    let file = open(path, O_RDONLY | O_CLOEXEC)
    if file < 0 { throw .system("cannot read \(path)") }
    defer { close(file) }
    var bytes = [UInt8](repeating: 0, count: 4096)
    let count = bytes.withUnsafeMutableBytes { read(file, $0.baseAddress, $0.count) }
    if count < 0 { throw .system("cannot read \(path)") }
    guard let offer = Offer(line: String(decoding: bytes[..<count], as: UTF8.self)) else {
      throw ExampleError("\(path) was not written by a trainer")
    }
    self = offer
  }

  public var description: String {
    "segment \(segmentName) buffer 0x\(String(address, radix: 16)) \(length) sha256 \(hash)"
  }
}
