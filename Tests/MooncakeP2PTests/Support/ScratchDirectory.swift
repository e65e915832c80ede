import Glibc

/// A temporary directory of one test, removed with everything in it.
final class ScratchDirectory: Sendable {
  let path: String

  init() {
    var template = Array("/tmp/mooncake-test-XXXXXX".utf8CString)
    guard mkdtemp(&template) != nil else { fatalError("no directory for a test") }
    path = template.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
  }

  deinit { Self.remove(path) }

  /// The path of something inside.
  subscript(_ name: String) -> String { path + "/" + name }

  /// Makes a file and its directories.
  @discardableResult
  func write(_ name: String, _ bytes: [UInt8], mode: mode_t = 0o644) -> String {
    let path = self[name]
    var end = path.utf8.index(after: self.path.utf8.endIndex)
    while let slash = path.utf8[end...].firstIndex(of: UInt8(ascii: "/")) {
      mkdir(String(path[..<slash]), 0o755)
      end = path.utf8.index(after: slash)
    }
    let file = open(path, O_WRONLY | O_CREAT | O_TRUNC, mode)
    precondition(file >= 0 && Glibc.write(file, bytes, bytes.count) == bytes.count)
    close(file)
    return path
  }

  /// Turns a directory into the leftover of a killed get.
  func leaveLock(in name: String) {
    var status = stat()
    precondition(stat(self[name], &status) == 0)
    var boot = [UInt8](repeating: 0, count: 64)
    let file = open("/proc/sys/kernel/random/boot_id", O_RDONLY)
    let count = read(file, &boot, boot.count)
    close(file)
    let text = "mooncake-get 1\n\(status.st_ino)\n\(status.st_dev)\n"
    write(name + "/lock", Array(text.utf8) + boot[..<max(0, count)], mode: 0o600)
    chmod(self[name], 0o700)
  }

  func contents(_ name: String) -> [UInt8]? {
    let file = open(self[name], O_RDONLY)
    if file < 0 { return nil }
    defer { close(file) }
    var bytes = [UInt8](repeating: 0, count: 1 << 20)
    let count = read(file, &bytes, bytes.count)
    return Array(bytes[..<max(0, count)])
  }

  /// The names in it, or in a directory below it, sorted.
  func names(in name: String = "") -> [String] {
    guard let stream = opendir(name.isEmpty ? path : self[name]) else { return [] }
    defer { closedir(stream) }
    var names: [String] = []
    while let entry = readdir(stream) {
      let name = withUnsafeBytes(of: entry.pointee.d_name) { bytes in
        String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
      }
      if name != "." && name != ".." { names.append(name) }
    }
    return names.sorted()
  }

  private static func remove(_ path: String) {
    if unlink(path) == 0 { return }
    if let stream = opendir(path) {
      var names: [String] = []
      while let entry = readdir(stream) {
        names.append(
          withUnsafeBytes(of: entry.pointee.d_name) { bytes in
            String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
          })
      }
      closedir(stream)
      for name in names where name != "." && name != ".." { remove(path + "/" + name) }
    }
    rmdir(path)
  }
}
