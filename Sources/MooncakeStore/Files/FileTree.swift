import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem

/// Finds the files to publish.
package enum FileTree {
  package struct Found {
    /// Where it is here.
    package var path: String
    /// Its path in the payload.
    package var name: String
  }

  /// Of one directory its contents; of several paths, or of a file, each under its last name. Links
  /// to files count as files. Sorted, so that the same files always are the same payload.
  package static func files(of paths: [String]) throws(EngineError) -> [Found] {
    if paths.isEmpty { throw EngineError(.invalidArgument, "no file or directory is named") }
    var found: [Found] = []
    for path in paths {
      if try kind(of: path) != .directory {
        found.append(Found(path: path, name: try lastName(of: path)))
      } else {
        let name = paths.count == 1 ? "" : try lastName(of: path)
        try walk(path, name: name, depth: 0, &found)
      }
    }
    if found.isEmpty {
      throw EngineError(
        .invalidArgument, "there are no files in \(paths.joined(separator: ", "))")
    }
    return found.sorted { $0.name.utf8.lexicographicallyPrecedes($1.name.utf8) }
  }

  private enum Kind {
    case file
    case directory
  }

  private static let maximumDepth = 64

  private static func walk(
    _ directory: String, name: String, depth: Int, _ found: inout [Found]
  ) throws(EngineError) {
    if depth > maximumDepth {
      throw EngineError(.invalidArgument, "\(directory): directories are nested too deeply")
    }
    for entry in try entries(of: directory) where !FileStaging.isStaging(entry) {
      let path = directory + "/" + entry
      let entryName = name.isEmpty ? entry : name + "/" + entry
      switch try kind(of: path) {
      case .directory:
        // Following it could go round in circles, or take the same files twice.
        if isLink(path) {
          throw EngineError(
            .invalidArgument,
            "\(path) is a link to a directory; only links to files are followed: publish the "
              + "directory itself, or remove the link")
        }
        try walk(path, name: entryName, depth: depth + 1, &found)
      case .file:
        if found.count == FileList.maximumFileCount {
          throw EngineError(
            .invalidArgument, "\(directory): more than \(FileList.maximumFileCount) files")
        }
        found.append(Found(path: path, name: entryName))
      }
    }
  }

  /// What a path leads to.
  private static func kind(of path: String) throws(EngineError) -> Kind {
    var status = stat()
    if stat(path, &status) != 0 {
      let error = Errno.current
      if isLink(path) {
        throw EngineError(.invalidArgument, "\(path) is a link that leads nowhere: \(error)")
      }
      throw FileFailure.error(path, error)
    }
    switch status.st_mode & S_IFMT {
    case S_IFREG: return .file
    case S_IFDIR: return .directory
    default:
      throw EngineError(
        .invalidArgument, "\(path) is neither a file nor a directory; it cannot be published")
    }
  }

  private static func isLink(_ path: String) -> Bool {
    var status = stat()
    return lstat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFLNK
  }

  /// Names in a directory, without itself and its parent.
  static func entries(of directory: String) throws(EngineError) -> [String] {
    guard let stream = opendir(directory) else {
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
        throw EngineError(.invalidArgument, "\(directory)/\(shown): the name is not UTF-8")
      }
      if name != "." && name != ".." { names.append(name) }
    }
  }

  private static func lastName(of path: String) throws(EngineError) -> String {
    let last = path.split(separator: "/").last.map(String.init) ?? ""
    if !["", ".", ".."].contains(last) { return last }
    guard let whole = realpath(path, nil) else { throw FileFailure.error(path, Errno.current) }
    defer { free(whole) }
    let text = String(cString: whole)
    guard let name = text.split(separator: "/").last else {
      throw EngineError(.invalidArgument, "\(path) has no name; publish it alone")
    }
    return String(name)
  }
}

/// Puts failures of system calls on files into words.
enum FileFailure {
  static func error(_ path: String, _ error: Errno, _ what: String = "") -> EngineError {
    let code: EngineError.Code =
      switch error.rawValue {
      case EACCES, EPERM, EROFS: .accessDenied
      case ENOSPC, EDQUOT: .full
      case EEXIST: .exists
      case ENOMEM: .outOfMemory
      default: .system
      }
    return EngineError(code, "\(path): \(what.isEmpty ? "" : what + ": ")\(error)")
  }
}
