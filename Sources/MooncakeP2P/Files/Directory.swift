import CLinux
import Glibc
import MooncakeSystem

/// An open directory. Its entries are reached by name within it, never by a path, and links are not
/// followed, so other users who can write into a directory cannot redirect a call elsewhere.
final class Directory: Sendable {
  /// For messages.
  let path: FilePath
  private let descriptor: FileDescriptor

  init(_ descriptor: consuming FileDescriptor, _ path: FilePath) {
    self.descriptor = descriptor
    self.path = path
  }

  var number: Int32 { descriptor.rawValue }

  /// Only names: a path could lead out of this directory.
  private static func isName(_ name: String) -> Bool {
    !name.isEmpty && name.utf8.allSatisfy { $0 != UInt8(ascii: "/") }
  }

  private static func check(_ name: String) throws(Errno) {
    if !isName(name) { throw Errno(EINVAL) }
  }

  /// The status of a name; nil if nothing has it.
  func status(of name: String) throws(Errno) -> stat? {
    try Self.check(name)
    var status = stat()
    if fstatat(number, name, &status, AT_SYMLINK_NOFOLLOW) == 0 { return status }
    let error = Errno.current
    if error.rawValue == ENOENT { return nil }
    throw error
  }

  func status() throws(Errno) -> stat {
    var status = stat()
    if fstat(number, &status) != 0 { throw Errno.current }
    return status
  }

  func directory(_ name: String) throws(Errno) -> Directory {
    let flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW
    return Directory(try file(name, flags: flags), path.appending(name))
  }

  func file(_ name: String, flags: Int32, mode: mode_t = 0o600) throws(Errno) -> FileDescriptor {
    try Self.check(name)
    return try FileDescriptor(
      opening: { openat(number, name, flags | O_NOFOLLOW | O_CLOEXEC, mode) })
  }

  /// Returns false if something already has that name.
  func makeDirectory(_ name: String, mode: mode_t = 0o777) throws(Errno) -> Bool {
    try Self.check(name)
    if mkdirat(number, name, mode) == 0 { return true }
    let error = Errno.current
    if error.rawValue == EEXIST { return false }
    throw error
  }

  /// Removes a name that is not a directory.
  @discardableResult
  func remove(_ name: String) -> Bool { Self.isName(name) && unlinkat(number, name, 0) == 0 }

  /// Removes an empty directory.
  @discardableResult
  func removeDirectory(_ name: String) -> Bool {
    Self.isName(name) && unlinkat(number, name, AT_REMOVEDIR) == 0
  }

  /// Moves a name from here to a name elsewhere; `flags` are those of renameat2.
  func move(
    _ name: String, to other: Directory, _ otherName: String, flags: Int = 0
  ) throws(Errno) {
    try Self.check(name)
    try Self.check(otherName)
    let result =
      flags == 0
      ? renameat(number, name, other.number, otherName)
      : linux_rename(number, name, other.number, otherName, UInt32(flags))
    if result != 0 { throw Errno.current }
  }

  /// The names in it, without those that are not UTF-8.
  func names() -> [String] {
    // A separate descriptor: reading moves a position that duplicates share.
    let copy = openat(number, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    if copy < 0 { return [] }
    guard let stream = fdopendir(copy) else {
      close(copy)
      return []
    }
    defer { closedir(stream) }
    var names: [String] = []
    while let entry = readdir(stream) {
      let bytes = withUnsafeBytes(of: entry.pointee.d_name) { Array($0.prefix { $0 != 0 }) }
      guard let name = String(validating: bytes, as: UTF8.self) else { continue }
      if name != "." && name != ".." { names.append(name) }
    }
    return names
  }

  /// Whether it has no entries, not even ones with odd names.
  func isEmpty() throws(Errno) -> Bool {
    let copy = openat(number, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    if copy < 0 { throw Errno.current }
    guard let stream = fdopendir(copy) else {
      let error = Errno.current
      close(copy)
      throw error
    }
    defer { closedir(stream) }
    while true {
      errno = 0
      guard let entry = readdir(stream) else {
        if errno != 0 { throw Errno.current }
        return true
      }
      let bytes = withUnsafeBytes(of: entry.pointee.d_name) { Array($0.prefix { $0 != 0 }) }
      if bytes != Array(".".utf8) && bytes != Array("..".utf8) { return false }
    }
  }

  /// Removes everything in it except one name; what is on another device stays.
  func clear(except kept: String? = nil, depth: Int = 0) {
    // Directories made here are never that deep.
    guard depth < 80, let device = try? status().st_dev else { return }
    for name in names() where name != kept {
      if remove(name) { continue }
      guard let inner = try? directory(name), let status = try? inner.status(),
        status.st_dev == device
      else { continue }
      inner.clear(depth: depth + 1)
      removeDirectory(name)
    }
  }
}

extension Directory {
  /// A directory made here, and its parent.
  struct Made {
    let parent: Directory
    let name: FilePath
    let number: UInt64

    /// Removes it if it is still the same one and empty.
    func remove() {
      var status = stat()
      let isThere = name.withCString { fstatat(parent.number, $0, &status, AT_SYMLINK_NOFOLLOW) }
      if isThere != 0 || UInt64(status.st_ino) != number { return }
      _ = name.withCString { unlinkat(parent.number, $0, AT_REMOVEDIR) }
    }
  }

  /// Opens the directory that the caller named, following links, and makes missing parts of the
  /// path.
  static func open(
    _ path: FilePath, _ made: inout [Made]
  ) throws(Errno) -> Directory {
    let slash = UInt8(ascii: "/")
    let start = path.bytes.first == slash ? "/" : "."
    var current = Directory(
      try .open(start, flags: Int32(LINUX_O_PATH) | O_DIRECTORY), FilePath(start))
    for part in path.bytes.split(separator: slash) where !part.elementsEqual(".".utf8) {
      current = try current.enter(FilePath(bytes: Array(part)), &made)
    }
    let last = current
    let readable = try FileDescriptor(
      opening: { openat(last.number, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC) })
    return Directory(readable, path)
  }

  private func enter(_ name: FilePath, _ made: inout [Made]) throws(Errno) -> Directory {
    let flags = Int32(LINUX_O_PATH) | O_DIRECTORY | O_CLOEXEC
    func opened() -> Int32 { name.withCString { openat(number, $0, flags) } }
    var descriptor = opened()
    if descriptor < 0 && Errno.current.rawValue == ENOENT {
      let isNew = name.withCString { mkdirat(number, $0, 0o777) } == 0
      if !isNew && Errno.current.rawValue != EEXIST { throw Errno.current }
      descriptor = opened()
      var status = stat()
      if isNew && descriptor >= 0 && fstat(descriptor, &status) == 0 {
        made.append(Made(parent: self, name: name, number: UInt64(status.st_ino)))
      }
    }
    if descriptor < 0 { throw Errno.current }
    return Directory(
      FileDescriptor(owning: try FileDescriptor.aboveStandard(descriptor)), name)
  }
}
