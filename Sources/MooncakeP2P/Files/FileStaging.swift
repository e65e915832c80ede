import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// Files while they arrive: mapped at full size in a hidden directory next to their places, and all
/// moved there together once every byte is there. A failure removes what was made, and nothing else
/// is ever removed (docs/store-files.md, "How files arrive").
package final class FileStaging {
  private let path: FilePath
  private let replacesFiles: Bool
  /// Whether the file system is asked to exchange two files in one step.
  private let exchanges: Bool
  /// The payload's name.
  private let payload: String
  private let sync: DiskSync
  /// The file name for a payload without a list of files.
  private let nameWithoutList: String
  private var target: Directory?
  /// Directories that this made, outermost first.
  private var made: [Directory.Made] = []
  private var area: StagingArea?
  private var list: FileList?
  private var arena: FileArena?

  package init(
    directory: FilePath, payload name: String, replacesFiles: Bool, exchanges: Bool = true,
    sync: DiskSync = .system
  ) {
    var bytes = directory.bytes
    while bytes.count > 1 && bytes.last == UInt8(ascii: "/") { bytes.removeLast() }
    path = FilePath(bytes: bytes)
    self.replacesFiles = replacesFiles
    self.exchanges = exchanges
    payload = name
    self.sync = sync
    nameWithoutList =
      name.utf8.split(separator: UInt8(ascii: "/")).last.map { String(Substring($0)) } ?? name
  }

  deinit { discard() }

  /// Makes room for the files of a payload; returns their memory and the range that contains all of
  /// it. Called again for another version.
  package func place(
    _ manifest: Manifest
  ) throws(MooncakeError) -> (buffers: [PayloadBuffer], range: PayloadBuffer?) {
    discard()
    do throws(MooncakeError) {
      let list = try list(of: manifest)
      let arena = try FileArena(sizes: list.files.map(\.size), "\(path)")
      let target = try open()
      if let lock = SwitchLock.tryTaking(target) {
        StagingArea.removeLeftovers(in: target, holdsSwitch: true)
        _ = consume lock
      } else {
        StagingArea.removeLeftovers(in: target, holdsSwitch: false)
      }
      try check(list, target)
      try checkMemory(list, target)
      self.arena = arena
      let buffers = try makeFiles(list, try makeArea())
      self.list = list
      return (buffers, arena.buffer)
    } catch {
      discard()
      throw error
    }
  }

  /// Moves the files to their places; `syncs`: they then survive a loss of power. After a failure
  /// their memory stays until `discard`.
  package func commit(
    syncs: Bool, _ bounds: Bounds? = nil
  ) throws(MooncakeError) -> [MappedFile] {
    guard let area, let list, let arena else { return [] }
    if syncs { try syncFiles(list, area) }
    let lock = try SwitchLock.take(area.target, bounds)
    StagingArea.removeLeftovers(in: area.target, holdsSwitch: true)
    // Notices anything that has been put in their places meanwhile.
    let entries = try entries(list, area)
    var result: [MappedFile] = []
    var change = FileSwitch(area, entries, exchanges: exchanges, sync)
    try change.run(syncs: syncs, others: made.map(\.parent)) { status in
      let file = list.files[result.count]
      result.append(
        MappedFile(
          received: path.appending(file.path), status, isExecutable: file.isExecutable,
          in: arena, index: result.count))
    }
    // From here on they stay.
    made = []
    _ = consume lock
    discard()
    return result
  }

  /// Removes everything that has not been moved to its place.
  package func discard() {
    list = nil
    arena = nil
    area?.remove()
    area = nil
    target = nil
    for made in made.reversed() { made.remove() }
    made = []
  }

  /// Somebody may still read the memory, so its addresses must not be reused.
  func keepMemory() { arena?.keep() }

  // MARK: Before the first byte

  private func list(of manifest: Manifest) throws(MooncakeError) -> FileList {
    if !manifest.attributes.isEmpty {
      do throws(MooncakeError) { return try FileList(parsing: manifest) } catch {
        throw MooncakeError(error.code, "payload '\(payload)': \(error.message)")
      }
    }
    do throws(MooncakeError) {
      return try FileList([.init(path: nameWithoutList, size: manifest.layout.size)])
    } catch {
      throw MooncakeError(
        .invalidArgument,
        "the payload was registered from memory and its name makes no file: \(error.message)")
    }
  }

  private func open() throws(MooncakeError) -> Directory {
    do throws(Errno) {
      var attempts = 0
      while true {
        do throws(Errno) {
          let target = try Directory.open(path, &made)
          self.target = target
          return target
        } catch {
          // Another get may be removing the directories that it made on this path.
          attempts += 1
          if error.rawValue != ENOENT || attempts == 100 { throw error }
        }
      }
    } catch {
      if error.rawValue == ENOTDIR {
        throw MooncakeError(.exists, "\(path): a part of it is a file, not a directory")
      }
      throw FileFailure.error(path, error, "making the directory")
    }
  }

  /// Checks whether all files can be put in their places.
  private func check(_ list: FileList, _ target: Directory) throws(MooncakeError) {
    var walk = DirectoryWalk(target)
    var seen: Set<UInt64> = []
    let device = try status(of: target).st_dev
    for file in list.files {
      let missing = try walk.open(directoryOf: file.path, makes: false)
      let parent = walk.current
      let directory = try status(of: parent)
      if seen.insert(UInt64(directory.st_ino)).inserted {
        try Self.checkDirectory(parent, directory, device)
      }
      if missing > 0 { continue }
      guard let present = try existing(file, parent) else { continue }
      let place = parent.path.appending(DirectoryWalk.name(of: file.path))
      if present.st_dev != device { throw Self.isElsewhere(place) }
      // With this bit set, only the owner of a file or of the directory may remove its name.
      let user = geteuid()
      if directory.st_mode & S_ISVTX != 0 && user != 0 && present.st_uid != user
        && directory.st_uid != user
      {
        throw MooncakeError(
          .accessDenied,
          "\(place) is another user's, in a directory where only owners may replace files")
      }
    }
  }

  private static func checkDirectory(
    _ directory: Directory, _ status: stat, _ device: dev_t
  ) throws(MooncakeError) {
    if status.st_dev != device { throw isElsewhere(directory.path) }
    if faccessat(directory.number, ".", W_OK | X_OK, AT_EACCESS) != 0 {
      throw FileFailure.error(directory.path, Errno.current, "writing into it")
    }
  }

  private static func isElsewhere(_ path: FilePath) -> MooncakeError {
    MooncakeError(
      .unsupported,
      "\(path) is on another file system than the directory that was named, so files cannot be put "
        + "there in one step: get into a directory of that file system")
  }

  static func isInTheWay(_ path: FilePath) -> MooncakeError {
    MooncakeError(.exists, "\(path) exists: ask to replace files, or choose another directory")
  }

  /// The existing file that may be replaced, if there is one.
  private func existing(
    _ file: FileList.File, _ parent: Directory
  ) throws(MooncakeError) -> stat? {
    let name = DirectoryWalk.name(of: file.path)
    let place = parent.path.appending(name)
    let status: stat?
    do throws(Errno) { status = try parent.status(of: name) } catch {
      throw FileFailure.error(place, error)
    }
    guard let status else { return nil }
    if status.st_mode & S_IFMT == S_IFDIR {
      throw MooncakeError(.exists, "\(place) is a directory, but the payload has a file there")
    }
    if !replacesFiles { throw Self.isInTheWay(place) }
    return status
  }

  private func status(of directory: Directory) throws(MooncakeError) -> stat {
    do throws(Errno) { return try directory.status() } catch {
      throw FileFailure.error(directory.path, error)
    }
  }

  /// On some file systems, files are memory.
  private func checkMemory(_ list: FileList, _ target: Directory) throws(MooncakeError) {
    if linux_is_memory_system(target.number) == 0 { return }
    try MemoryRoom.check(list.files.reduce(0) { $0 &+ $1.size }, "\(path), which is in memory")
  }

  // MARK: Making

  private func makeArea() throws(MooncakeError) -> StagingArea {
    for _ in 0..<1000 {
      if let area = try StagingArea.make(in: target!) {
        self.area = area
        return area
      }
      // Another get made the directory, failed, and removed it.
      _ = try open()
    }
    throw MooncakeError(.busy, "\(path): other programs keep removing it")
  }

  private func makeFiles(
    _ list: FileList, _ area: StagingArea
  ) throws(MooncakeError) -> [PayloadBuffer] {
    var walk = DirectoryWalk(area.new)
    var buffers: [PayloadBuffer] = []
    for (index, file) in list.files.enumerated() {
      let place = path.appending(file.path)
      _ = try walk.open(directoryOf: file.path, makes: true)
      let descriptor: FileDescriptor
      do throws(Errno) {
        descriptor = try walk.current.file(
          DirectoryWalk.name(of: file.path), flags: O_RDWR | O_CREAT | O_EXCL,
          mode: file.isExecutable ? 0o777 : 0o666)
      } catch {
        throw FileFailure.error(place, error, "making it")
      }
      if file.size == 0 { continue }
      guard let size = off_t(exactly: file.size) else {
        throw MooncakeError(.full, "\(place): \(file.size) bytes are more than a file can have")
      }
      // A full disk is reported here, instead of by a signal when the last page is written.
      let number = descriptor.rawValue
      let error = withoutWriteSignals {
        var error: Int32
        repeat { error = posix_fallocate(number, 0, size) } while error == EINTR
        return error
      }
      if error != 0 { throw Self.noRoom(place, file.size, Errno(error), descriptor) }
      let address = try arena!.map(index, descriptor, file.size, place, writable: true)
      buffers.append(PayloadBuffer(address: address, length: file.size))
    }
    return buffers
  }

  private static func noRoom(
    _ place: FilePath, _ size: UInt64, _ error: Errno, _ descriptor: borrowing FileDescriptor
  ) -> MooncakeError {
    var text = "making room for \(size) bytes"
    var room = statvfs()
    if fstatvfs(descriptor.rawValue, &room) == 0 {
      text += " where \(UInt64(room.f_bavail) &* UInt64(room.f_frsize)) are free"
    }
    return FileFailure.error(place, error, text)
  }

  // MARK: At the end

  /// What is to be moved: the files as they are, and what is in their places now.
  private func entries(
    _ list: FileList, _ area: StagingArea
  ) throws(MooncakeError) -> [FileSwitch.Entry] {
    var targets = DirectoryWalk(area.target)
    var staged = DirectoryWalk(area.new)
    var entries: [FileSwitch.Entry] = []
    for file in list.files {
      let missing = try targets.open(directoryOf: file.path, makes: false)
      _ = try staged.open(directoryOf: file.path, makes: false)
      let present = missing == 0 ? try existing(file, targets.current) : nil
      let complete: stat?
      do throws(Errno) {
        complete = try staged.current.status(of: DirectoryWalk.name(of: file.path))
      } catch {
        throw FileFailure.error(staged.current.path, error)
      }
      guard let complete, UInt64(complete.st_size) == file.size else {
        throw MooncakeError(
          .system, "\(path.appending(file.path)): another program changed it while it arrived")
      }
      entries.append(
        FileSwitch.Entry(
          path: file.path, new: .init(complete), old: present.map { UInt64($0.st_ino) } ?? 0,
          depth: targets.chain.count - 1))
    }
    return entries
  }

  private func syncFiles(_ list: FileList, _ area: StagingArea) throws(MooncakeError) {
    var walk = DirectoryWalk(area.new)
    for file in list.files {
      _ = try walk.open(directoryOf: file.path, makes: false)
      do throws(Errno) {
        let open = try walk.current.file(DirectoryWalk.name(of: file.path), flags: O_RDONLY)
        try sync(open.rawValue)
      } catch {
        throw FileFailure.error(path.appending(file.path), error, "writing it to the disk")
      }
    }
  }
}
