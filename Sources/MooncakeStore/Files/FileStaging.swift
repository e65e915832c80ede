import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem

/// Files on their way: in a hidden directory beside where they will be, complete in size, mapped,
/// and put in their places only when every byte is there. What was made is removed on any failure.
package final class FileStaging {
  /// Keeps a descriptor open where only what can be copied may stand.
  private final class OpenDirectory {
    let descriptor: FileDescriptor
    init(_ descriptor: consuming FileDescriptor) { self.descriptor = descriptor }
  }

  private static let prefix = ".mooncake-get-"

  private let directory: String
  private let replacesFiles: Bool
  /// The name of the file that a payload without a list becomes.
  private let nameWithoutList: String
  /// Directories that were not there before, outermost first.
  private var madeDirectories: [String] = []
  private var hidden: String?
  /// Locked while it is in use, so that others know what a killed process has left.
  private var lock: OpenDirectory?
  private var list: FileList?
  /// Of each file of the list, in order; none of an empty one.
  private var memories: [FileMemory?] = []

  package init(directory: String, payload name: String, replacesFiles: Bool) {
    var directory = directory
    while directory.utf8.count > 1 && directory.last == "/" { directory.removeLast() }
    self.directory = directory
    self.replacesFiles = replacesFiles
    nameWithoutList = name.split(separator: "/").last.map(String.init) ?? name
  }

  deinit { discard() }

  /// Whether a name is that of a directory in use here, or left by a process that was killed.
  static func isStaging(_ name: String) -> Bool { name.hasPrefix(prefix) }

  /// Makes room for the files of a payload and returns their memory. Again for another version.
  package func place(_ manifest: Manifest) throws(EngineError) -> [PayloadBuffer] {
    discard()
    do throws(EngineError) {
      let list = try list(of: manifest)
      try makeDirectories(upTo: directory)
      try checkTargets(list)
      removeLeftovers()
      try makeHidden()
      var buffers: [PayloadBuffer] = []
      for file in list.files {
        let memory = try make(file)
        memories.append(memory)
        if let memory {
          buffers.append(PayloadBuffer(address: memory.address, length: file.size))
        }
      }
      self.list = list
      return buffers
    } catch {
      discard()
      throw error
    }
  }

  /// Puts the files in their places; `syncs`: they survive a loss of power from then on. After a
  /// failure their memory stays until `discard`.
  package func commit(syncs: Bool) throws(EngineError) -> [MappedFile] {
    guard let hidden, let list else { return [] }
    if syncs { for file in list.files { try sync(hidden + "/" + file.path) } }
    // What has come into their way meanwhile is not overwritten.
    try checkTargets(list)
    var result: [MappedFile] = []
    var parents = [Array(directory.utf8): directory]
    for (file, memory) in zip(list.files, memories) {
      let target = directory + "/" + file.path
      let parent = Self.parent(of: target)
      if parents.updateValue(parent, forKey: Array(parent.utf8)) == nil {
        try makeDirectories(upTo: parent)
      }
      if rename(hidden + "/" + file.path, target) != 0 {
        throw FileFailure.error(target, Errno.current, "renaming the complete file")
      }
      result.append(
        try MappedFile(
          received: target, size: file.size, isExecutable: file.isExecutable, memory: memory))
    }
    if syncs { for parent in parents.values { try sync(parent) } }
    // They stay from here on.
    madeDirectories = []
    discard()
    return result
  }

  /// Removes everything that has not been put in its place.
  package func discard() {
    list = nil
    memories = []
    if let hidden { Self.removeTree(hidden) }
    hidden = nil
    lock = nil
    for made in madeDirectories.reversed() { rmdir(made) }
    madeDirectories = []
  }

  private func list(of manifest: Manifest) throws(EngineError) -> FileList {
    if !manifest.attributes.isEmpty { return try FileList(parsing: manifest) }
    do throws(EngineError) {
      return try FileList([.init(path: nameWithoutList, size: manifest.layout.size)])
    } catch {
      throw EngineError(
        .invalidArgument,
        "the payload was registered from memory and its name makes no file: \(error.message)")
    }
  }

  private func checkTargets(_ list: FileList) throws(EngineError) {
    var status = stat()
    var parents: Set<[UInt8]> = []
    for file in list.files {
      let target = directory + "/" + file.path
      if lstat(target, &status) == 0 {
        if status.st_mode & S_IFMT == S_IFDIR {
          throw EngineError(.exists, "\(target) is a directory, the payload has a file there")
        }
        if !replacesFiles {
          throw EngineError(
            .exists, "\(target) exists: ask to replace files, or choose another directory")
        }
      }
      var parent = Self.parent(of: target)
      while parent.utf8.count > directory.utf8.count,
        parents.insert(Array(parent.utf8)).inserted
      {
        if stat(parent, &status) == 0 && status.st_mode & S_IFMT != S_IFDIR {
          throw EngineError(.exists, "\(parent) is a file, the payload has a directory there")
        }
        parent = Self.parent(of: parent)
      }
    }
  }

  private func makeHidden() throws(EngineError) {
    var template = Array((directory + "/" + Self.prefix + "XXXXXX").utf8CString)
    guard mkdtemp(&template) != nil else {
      throw FileFailure.error(directory, Errno.current, "making a directory in it")
    }
    let path = template.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
    hidden = path
    if let descriptor = try? FileDescriptor.open(path, flags: O_RDONLY | O_DIRECTORY) {
      _ = flock(descriptor.rawValue, LOCK_EX | LOCK_NB)
      lock = OpenDirectory(descriptor)
    }
  }

  /// Makes one file of its final size.
  private func make(_ file: FileList.File) throws(EngineError) -> FileMemory? {
    let path = hidden! + "/" + file.path
    let target = directory + "/" + file.path
    try Self.makeDirectories(from: hidden!, upTo: Self.parent(of: path)) { _ in }
    let descriptor: FileDescriptor
    do throws(Errno) {
      descriptor = try .open(
        path, flags: O_RDWR | O_CREAT | O_EXCL, mode: file.isExecutable ? 0o777 : 0o666)
    } catch {
      throw FileFailure.error(target, error, "making it")
    }
    if file.size == 0 { return nil }
    guard let size = off_t(exactly: file.size) else {
      throw EngineError(.full, "\(target): \(file.size) bytes are more than a file can have")
    }
    // A disk that is full says so here, not by a signal when the last page is written.
    var error: Int32
    repeat { error = posix_fallocate(descriptor.rawValue, 0, size) } while error == EINTR
    if error != 0 { throw Self.noRoom(target, file.size, Errno(error), descriptor) }
    return try FileMemory(descriptor, file.size, target, writable: true)
  }

  private static func noRoom(
    _ target: String, _ size: UInt64, _ error: Errno, _ descriptor: borrowing FileDescriptor
  ) -> EngineError {
    var text = "making room for \(size) bytes"
    var room = statvfs()
    if fstatvfs(descriptor.rawValue, &room) == 0 {
      text += " where \(UInt64(room.f_bavail) &* UInt64(room.f_frsize)) are free"
    }
    return FileFailure.error(target, error, text)
  }

  private func makeDirectories(upTo path: String) throws(EngineError) {
    try Self.makeDirectories(from: "", upTo: path) { madeDirectories.append($0) }
  }

  private static func makeDirectories(
    from base: String, upTo path: String, _ made: (String) -> Void
  ) throws(EngineError) {
    if path.utf8.count <= base.utf8.count { return }
    if mkdir(path, 0o777) == 0 { return made(path) }
    var error = Errno.current
    if error.rawValue == ENOENT {
      let parent = parent(of: path)
      if parent != path && !parent.isEmpty {
        try makeDirectories(from: base, upTo: parent, made)
        if mkdir(path, 0o777) == 0 { return made(path) }
        error = Errno.current
      }
    }
    var status = stat()
    if error.rawValue == EEXIST, stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFDIR {
      return
    }
    throw FileFailure.error(path, error, "making the directory")
  }

  /// Removes hidden directories whose processes have ended without doing so.
  private func removeLeftovers() {
    for name in (try? FileTree.entries(of: directory)) ?? [] where Self.isStaging(name) {
      let path = directory + "/" + name
      guard let descriptor = try? FileDescriptor.open(path, flags: O_RDONLY | O_DIRECTORY) else {
        continue
      }
      if flock(descriptor.rawValue, LOCK_EX | LOCK_NB) == 0 { Self.removeTree(path) }
    }
  }

  private static func removeTree(_ path: String) {
    for name in (try? FileTree.entries(of: path)) ?? [] {
      let entry = path + "/" + name
      // Links are removed, not followed.
      if unlink(entry) != 0 { removeTree(entry) }
    }
    rmdir(path)
  }

  private func sync(_ path: String) throws(EngineError) {
    do throws(Errno) {
      let descriptor = try FileDescriptor.open(path, flags: O_RDONLY)
      _ = try retryingInterrupts { fsync(descriptor.rawValue) }
    } catch {
      throw FileFailure.error(path, error, "writing it to the disk")
    }
  }

  private static func parent(of path: String) -> String {
    guard let slash = path.utf8.lastIndex(of: UInt8(ascii: "/")) else { return "" }
    let parent = String(path[..<slash])
    return parent.isEmpty ? "/" : parent
  }
}
