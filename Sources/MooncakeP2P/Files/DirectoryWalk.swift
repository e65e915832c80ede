import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// Walks through the directories of a payload's files below one directory. Those on the current
/// path stay open, and links are not followed.
struct DirectoryWalk {
  let root: Directory
  private var inner: [(name: Substring, directory: Directory)] = []

  init(_ root: Directory) { self.root = root }

  /// The root and the directories on the current path, outermost first.
  var chain: [Directory] { [root] + inner.map(\.directory) }

  /// The last part of a path.
  static func name(of path: String) -> String {
    path.utf8.lastIndex(of: UInt8(ascii: "/")).map { String(path[path.utf8.index(after: $0)...]) }
      ?? path
  }

  /// Opens the directory of a path and returns how many of its parts are missing. `makes`: missing
  /// ones are made. Otherwise the innermost existing one is opened.
  mutating func open(directoryOf path: String, makes: Bool) throws(MooncakeError) -> Int {
    // By bytes: "/" and a combining mark after it are one character.
    let parts = path.utf8.split(separator: UInt8(ascii: "/")).dropLast().map { Substring($0) }
    var common = 0
    for (part, open) in zip(parts, inner) {
      if !part.utf8.elementsEqual(open.name.utf8) { break }
      common += 1
    }
    inner.removeLast(inner.count - common)
    for (index, part) in parts.enumerated().dropFirst(common) {
      guard let next = try enter(String(part), makes: makes) else { return parts.count - index }
      inner.append((part, next))
    }
    return 0
  }

  /// The innermost open directory.
  var current: Directory { inner.last?.directory ?? root }

  private func enter(_ name: String, makes: Bool) throws(MooncakeError) -> Directory? {
    let path = current.path.appending(name)
    do throws(Errno) {
      if makes { _ = try current.makeDirectory(name) }
      return try current.directory(name)
    } catch {
      if error.rawValue == ENOENT && !makes { return nil }
      let status = (try? current.status(of: name)) ?? nil
      switch status.map({ $0.st_mode & S_IFMT }) {
      case S_IFLNK:
        throw MooncakeError(
          .exists,
          "\(path) is a link; files are not written through links: name the directory that it "
            + "leads to, or remove it")
      case .some(let kind) where kind != S_IFDIR:
        throw MooncakeError(.exists, "\(path) is a file, but the payload has a directory there")
      default:
        throw FileFailure.error(path, error, makes ? "making the directory" : "opening it")
      }
    }
  }
}
