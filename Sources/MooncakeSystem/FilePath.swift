import Glibc

/// A path as the system sees it: bytes that need not be UTF-8.
public struct FilePath: Hashable, Sendable, CustomStringConvertible {
  public let bytes: [UInt8]

  public init(bytes: [UInt8]) { self.bytes = bytes }

  public init(_ text: String) { bytes = Array(text.utf8) }

  /// For people: invalid UTF-8 is replaced.
  public var description: String { String(decoding: bytes, as: UTF8.self) }

  /// The path of an entry in this directory.
  package func appending(_ name: String) -> FilePath {
    let slash = UInt8(ascii: "/")
    return FilePath(bytes: bytes + (bytes.last == slash ? [] : [slash]) + name.utf8)
  }

  /// Calls `body` with the path as a C string.
  package func withCString<Result>(_ body: (UnsafePointer<CChar>) -> Result) -> Result {
    (bytes + [0]).withUnsafeBytes { body($0.baseAddress!.assumingMemoryBound(to: CChar.self)) }
  }
}

extension FileDescriptor {
  /// Opens a path; always close-on-exec.
  package static func open(
    _ path: FilePath, flags: Int32, mode: mode_t = 0o600
  ) throws(Errno) -> FileDescriptor {
    try FileDescriptor(
      opening: { path.withCString { Glibc.open($0, flags | O_CLOEXEC, mode) } })
  }
}
