import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// Finds the files to publish.
package enum FileTree {
  package struct Found {
    /// Its local path.
    package var path: FilePath
    /// Its path in the payload.
    package var name: String
    package var size: UInt64
  }

  /// The contents of one directory; or of several paths, or of a file, each under its last name.
  /// Links to files count as files. Sorted, so that the same files always make the same payload.
  package static func files(of paths: [FilePath]) throws(MooncakeError) -> [Found] {
    if paths.isEmpty { throw MooncakeError(.invalidArgument, "no file or directory is named") }
    var found: [Found] = []
    for path in paths {
      if case .file(let size) = try kind(of: path) {
        found.append(Found(path: path, name: try lastName(of: path), size: size))
      } else {
        let name = paths.count == 1 ? "" : try lastName(of: path)
        try walk(path, name: name, depth: 0, &found)
      }
    }
    if found.isEmpty {
      let named = paths.map(\.description).joined(separator: ", ")
      throw MooncakeError(.invalidArgument, "there are no files in \(named)")
    }
    return found.sorted { $0.name.utf8.lexicographicallyPrecedes($1.name.utf8) }
  }

  private enum Kind {
    case file(UInt64)
    case directory
  }

  private static let maximumDepth = 64

  private static func walk(
    _ directory: FilePath, name: String, depth: Int, _ found: inout [Found]
  ) throws(MooncakeError) {
    if depth > maximumDepth {
      throw MooncakeError(.invalidArgument, "\(directory): directories are nested too deeply")
    }
    for entry in try entries(of: directory) where !StagingArea.isStaging(entry) {
      let path = directory.appending(entry)
      let entryName = name.isEmpty ? entry : name + "/" + entry
      switch try kind(of: path) {
      case .directory:
        // Following it could loop, or include the same files twice.
        if isLink(path) {
          throw MooncakeError(
            .invalidArgument,
            "\(path) is a link to a directory; only links to files are followed: publish the "
              + "directory itself, or remove the link")
        }
        try walk(path, name: entryName, depth: depth + 1, &found)
      case .file(let size):
        if found.count == FileList.maximumFileCount {
          throw MooncakeError(
            .invalidArgument, "\(directory): more than \(FileList.maximumFileCount) files")
        }
        found.append(Found(path: path, name: entryName, size: size))
      }
    }
  }

  /// What a path refers to, after links.
  private static func kind(of path: FilePath) throws(MooncakeError) -> Kind {
    var status = stat()
    if path.withCString({ stat($0, &status) }) != 0 {
      let error = Errno.current
      if isLink(path) {
        throw MooncakeError(.invalidArgument, "\(path) is a link that leads nowhere: \(error)")
      }
      throw FileFailure.error(path, error)
    }
    switch status.st_mode & S_IFMT {
    case S_IFREG: return .file(UInt64(status.st_size))
    case S_IFDIR: return .directory
    default:
      throw MooncakeError(
        .invalidArgument, "\(path) is neither a file nor a directory; it cannot be published")
    }
  }

  private static func isLink(_ path: FilePath) -> Bool {
    var status = stat()
    return path.withCString { lstat($0, &status) } == 0 && status.st_mode & S_IFMT == S_IFLNK
  }

  /// The names in a directory, without "." and "..".
  private static func entries(of directory: FilePath) throws(MooncakeError) -> [String] {
    guard let stream = directory.withCString({ opendir($0) }) else {
      throw FileFailure.error(directory, Errno.current)
    }
    defer { closedir(stream) }
    var names: [String] = []
    while true {
      errno = 0
      guard let entry = readdir(stream) else {
        if errno != 0 { throw FileFailure.error(directory, Errno.current) }
        return names
      }
      let bytes = withUnsafeBytes(of: entry.pointee.d_name) { name in
        Array(name.prefix { $0 != 0 })
      }
      guard let name = String(validating: bytes, as: UTF8.self) else {
        let shown = String(decoding: bytes, as: UTF8.self)
        throw MooncakeError(.invalidArgument, "\(directory)/\(shown): the name is not UTF-8")
      }
      if name != "." && name != ".." { names.append(name) }
    }
  }

  private static func lastName(of path: FilePath) throws(MooncakeError) -> String {
    let slash = UInt8(ascii: "/")
    var last = path.bytes.split(separator: slash).last.map(Array.init) ?? []
    if ["", ".", ".."].contains(where: { last.elementsEqual($0.utf8) }) {
      guard let whole = path.withCString({ realpath($0, nil) }) else {
        throw FileFailure.error(path, Errno.current)
      }
      defer { free(whole) }
      let bytes = UnsafeRawBufferPointer(start: whole, count: strlen(whole))
      last = bytes.split(separator: slash).last.map(Array.init) ?? []
    }
    guard let name = String(validating: last, as: UTF8.self) else {
      throw MooncakeError(
        .invalidArgument, "\(path): the name is not UTF-8, which names in a payload must be")
    }
    if name.isEmpty {
      throw MooncakeError(.invalidArgument, "\(path) has no name; publish it alone")
    }
    return name
  }
}

/// Turns failed system calls on files into errors.
enum FileFailure {
  static func error(_ path: FilePath, _ error: Errno, _ what: String = "") -> MooncakeError {
    let code: MooncakeError.Code =
      switch error.rawValue {
      case EACCES, EPERM, EROFS: .accessDenied
      case ENOSPC, EDQUOT: .full
      case EEXIST: .exists
      case ENOMEM: .outOfMemory
      default: .system
      }
    return MooncakeError(code, "\(path): \(what.isEmpty ? "" : what + ": ")\(error)")
  }
}
