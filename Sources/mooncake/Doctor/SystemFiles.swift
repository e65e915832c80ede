import Glibc
import MooncakeSystem

/// Small files of /proc, /sys and /etc.
enum SystemFiles {
  /// The text of a file without surrounding space; nil if it cannot be read.
  static func text(_ path: String) -> String? {
    guard let file = try? FileDescriptor.open(path, flags: O_RDONLY) else { return nil }
    var bytes = [UInt8](repeating: 0, count: 64 << 10)
    let count = bytes.withUnsafeMutableBytes { read(file.rawValue, $0.baseAddress, $0.count) }
    if count < 0 { return nil }
    var text = Substring(decoding: bytes[..<count], as: UTF8.self)
    while text.last?.isWhitespace == true || text.last == "\0" { text.removeLast() }
    while text.first?.isWhitespace == true { text.removeFirst() }
    return String(text)
  }

  /// The whitespace-separated numbers of a file.
  static func numbers(_ path: String) -> [UInt64] {
    (text(path) ?? "").split(whereSeparator: \.isWhitespace).compactMap { UInt64($0) }
  }

  /// Names in a folder, sorted; empty if it does not exist.
  static func names(in path: String) -> [String] {
    guard let folder = opendir(path) else { return [] }
    defer { closedir(folder) }
    var names: [String] = []
    while let entry = readdir(folder) {
      let name = withUnsafeBytes(of: entry.pointee.d_name) { bytes in
        String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
      }
      if !name.hasPrefix(".") { names.append(name) }
    }
    return names.sorted()
  }

  static func exists(_ path: String) -> Bool { access(path, F_OK) == 0 }

  /// The text after a key such as "MemTotal:" on its line.
  static func field(_ key: String, of path: String) -> String? {
    for line in (text(path) ?? "").split(separator: "\n") where line.hasPrefix(key) {
      return String(line.dropFirst(key.count).drop { $0.isWhitespace || $0 == ":" })
    }
    return nil
  }
}
