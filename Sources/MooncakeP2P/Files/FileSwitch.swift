import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// Moves the files of a staging area to their places, all or none. It first writes its plan to the
/// file `switch` in the area, so that the next get can undo what a killed one began. Files are
/// identified by inode number, so undoing can start from any state and be repeated.
struct FileSwitch {
  /// A file and what it replaces.
  struct Entry: Equatable {
    var path: String
    /// The complete file.
    var new: Identity
    /// Inode number of the file that it replaces; 0: none.
    var old: UInt64
    /// How many directories of the path already exist.
    var depth: Int
  }
  /// Tells whether a file is still the one that was put in place.
  struct Identity: Equatable {
    var number: UInt64
    var seconds: Int
    var nanoseconds: Int

    init(number: UInt64, seconds: Int, nanoseconds: Int) {
      self.number = number
      self.seconds = seconds
      self.nanoseconds = nanoseconds
    }

    init(_ status: stat) {
      self.init(
        number: UInt64(status.st_ino), seconds: status.st_mtim.tv_sec,
        nanoseconds: status.st_mtim.tv_nsec)
    }
  }

  let area: StagingArea
  let entries: [Entry]
  /// Whether the file system is asked to exchange two files in one step.
  private var exchanges: Bool
  private let sync: DiskSync
  private var targets: DirectoryWalk
  private var staged: DirectoryWalk

  static let journalName = "switch"

  init(
    _ area: StagingArea, _ entries: [Entry], exchanges: Bool = true, _ sync: DiskSync = .system
  ) {
    self.sync = sync
    self.area = area
    self.entries = entries
    self.exchanges = exchanges
    targets = DirectoryWalk(area.target)
    staged = DirectoryWalk(area.new)
  }

  /// Makes the switch, or throws and leaves everything as it was. `syncs`: it survives a loss of
  /// power, and so do the new directories in `others`. Calls `placed` with the state of each file
  /// in its place.
  mutating func run(
    syncs: Bool, others: [Directory] = [], placed: (stat) -> Void
  ) throws(MooncakeError) {
    try writeJournal(syncs: syncs || entries.contains { $0.old != 0 })
    do throws(MooncakeError) {
      for (index, entry) in entries.enumerated() { placed(try put(entry, index)) }
      if syncs { try syncTargets(others) }
    } catch {
      giveUp()
      throw error
    }
    area.directory.remove(Self.journalName)
    if syncs { try? sync(area.directory) }
  }

  // MARK: There

  private mutating func put(_ entry: Entry, _ index: Int) throws(MooncakeError) -> stat {
    _ = try targets.open(directoryOf: entry.path, makes: true)
    _ = try staged.open(directoryOf: entry.path, makes: false)
    let (from, to) = (staged.current, targets.current)
    let name = DirectoryWalk.name(of: entry.path)
    do throws(Errno) {
      if entry.old == 0 {
        try Self.moveToNothing(name, from, name, to)
      } else {
        try replace(entry, index, name, from, to)
      }
      guard let status = try to.status(of: name), Identity(status) == entry.new else {
        throw Errno(ESTALE)
      }
      return status
    } catch {
      let path = area.target.path.appending(entry.path)
      switch error.rawValue {
      case EEXIST: throw FileStaging.isInTheWay(path)
      case ESTALE:
        throw MooncakeError(
          .busy, "\(path): another program changed it meanwhile; nothing was replaced")
      default: throw FileFailure.error(path, error, "putting the complete file there")
      }
    }
  }

  private mutating func replace(
    _ entry: Entry, _ index: Int, _ name: String, _ from: Directory, _ to: Directory
  ) throws(Errno) {
    if exchanges {
      do throws(Errno) {
        try from.move(name, to: to, name, flags: Int(LINUX_RENAME_EXCHANGE))
        if try from.status(of: name).map({ UInt64($0.st_ino) }) == entry.old { return }
        // It is not the file that was to be replaced.
        try from.move(name, to: to, name, flags: Int(LINUX_RENAME_EXCHANGE))
        throw Errno(ESTALE)
      } catch {
        if !Self.isUnsupported(error) { throw error }
        exchanges = false
      }
    }
    guard try to.status(of: name).map({ UInt64($0.st_ino) }) == entry.old else {
      throw Errno(ESTALE)
    }
    try to.move(name, to: area.old, "\(index)")
    try Self.moveToNothing(name, from, name, to)
  }

  private static func moveToNothing(
    _ name: String, _ from: Directory, _ newName: String, _ to: Directory
  ) throws(Errno) {
    do throws(Errno) {
      try from.move(name, to: to, newName, flags: Int(LINUX_RENAME_NOREPLACE))
    } catch {
      if !isUnsupported(error) { throw error }
      if try to.status(of: newName) != nil { throw Errno(EEXIST) }
      try from.move(name, to: to, newName)
    }
  }

  private static func isUnsupported(_ error: Errno) -> Bool {
    [EINVAL, ENOSYS, EOPNOTSUPP].contains(error.rawValue)
  }

  private mutating func syncTargets(_ others: [Directory]) throws(MooncakeError) {
    var done: Set<UInt64> = []
    for entry in entries {
      _ = try targets.open(directoryOf: entry.path, makes: false)
      for directory in targets.chain {
        do throws(Errno) {
          if done.insert(UInt64(try directory.status().st_ino)).inserted { try sync(directory) }
        } catch {
          throw FileFailure.error(directory.path, error, "writing it to the disk")
        }
      }
    }
    for directory in others {
      do throws(Errno) { try sync(directory) } catch {
        throw FileFailure.error(
          area.target.path, error, "writing the directory that it was made in to the disk")
      }
    }
  }

  // MARK: And back

  private mutating func giveUp() {
    if undo() {
      area.directory.remove(Self.journalName)
      return
    }
    area.isKept = true
    Log.warning(
      "\(area.directory.path): replaced files could not be put back, because other files have "
        + "taken their places; they are kept in there")
  }

  /// Puts everything back; returns false if a replaced file is still in the area.
  private mutating func undo() -> Bool {
    var isDone = true
    for (index, entry) in entries.enumerated().reversed() {
      do throws(MooncakeError) {
        isDone = try back(entry, index) && isDone
      } catch {
        isDone = isDone && entry.old == 0
      }
    }
    for entry in entries.reversed() { removeDirectories(of: entry) }
    return isDone
  }

  private mutating func back(_ entry: Entry, _ index: Int) throws(MooncakeError) -> Bool {
    let isThere = try targets.open(directoryOf: entry.path, makes: false) == 0
    _ = try staged.open(directoryOf: entry.path, makes: true)
    let (inside, outside) = (staged.current, targets.current)
    let name = DirectoryWalk.name(of: entry.path)
    let kept = "\(index)"
    do throws(Errno) {
      func holdsOld(_ directory: Directory, _ name: String) throws(Errno) -> Bool {
        let status = try directory.status(of: name)
        return entry.old != 0 && status.map { UInt64($0.st_ino) } == entry.old
      }
      let isExchanged = try holdsOld(inside, name)
      let isKept = try holdsOld(area.old, kept)
      if !isThere { return !isExchanged && !isKept }
      let present = try outside.status(of: name)
      if let present, Identity(present) == entry.new {
        if isExchanged {
          try inside.move(name, to: outside, name, flags: Int(LINUX_RENAME_EXCHANGE))
          return true
        }
        try Self.moveToNothing(name, outside, name, inside)
      } else if present != nil || isExchanged {
        return !isExchanged && !isKept
      }
      if isKept { try Self.moveToNothing(kept, area.old, name, outside) }
      return true
    } catch {
      throw FileFailure.error(outside.path.appending(name), error, "putting back what was there")
    }
  }

  /// Removes directories of the path that were made for it, if they are empty.
  private mutating func removeDirectories(of entry: Entry) {
    var path = entry.path[...]
    var depth = path.utf8.count { $0 == UInt8(ascii: "/") }
    while depth > entry.depth, let slash = path.utf8.lastIndex(of: UInt8(ascii: "/")) {
      path = path[..<slash]
      depth -= 1
      let text = String(path)
      guard (try? targets.open(directoryOf: text, makes: false)) == 0 else { continue }
      if !targets.current.removeDirectory(DirectoryWalk.name(of: text)) { return }
    }
  }

  // MARK: The journal

  private static let header = "mooncake-switch 1\n"
  private static let maximumJournalBytes = 64 << 20

  private func writeJournal(syncs: Bool) throws(MooncakeError) {
    // Paths contain no control characters, so a line is a record.
    var text = Self.header
    for entry in entries {
      let new = entry.new
      text += "\(entry.depth) \(new.number) \(new.seconds) \(new.nanoseconds) \(entry.old) "
      text += entry.path + "\n"
    }
    text += "end\n"
    do throws(Errno) {
      // It gets its name once it is complete: a part of it means that nothing has begun.
      let part = Self.journalName + ".part"
      let file = try area.directory.file(part, flags: O_WRONLY | O_CREAT | O_EXCL)
      var bytes = Array(text.utf8)[...]
      while !bytes.isEmpty {
        let count = try retryingInterrupts {
          bytes.withUnsafeBytes { write(file.rawValue, $0.baseAddress, $0.count) }
        }
        bytes = bytes.dropFirst(count)
      }
      // Otherwise a loss of power could leave the new names and no way back.
      if syncs {
        try sync(file.rawValue)
        try area.syncLock(sync)
      }
      try area.directory.move(part, to: area.directory, Self.journalName)
      if syncs { try sync(area.directory) }
    } catch {
      area.directory.remove(Self.journalName)
      throw FileFailure.error(area.target.path, error, "noting what is to be put there")
    }
  }

  /// Whether an abandoned area contains an unfinished switch.
  static func isBroken(in directory: Directory) -> Bool {
    do throws(Errno) { return try directory.status(of: journalName) != nil } catch { return true }
  }

  /// Undoes what a killed process began; returns false if a replaced file is left in the area.
  static func recover(_ area: StagingArea) -> Bool {
    guard let entries = readJournal(area) else { return false }
    var change = FileSwitch(area, entries)
    return change.undo()
  }

  private static func readJournal(_ area: StagingArea) -> [Entry]? {
    guard let file = try? area.directory.file(journalName, flags: O_RDONLY | O_NONBLOCK) else {
      return nil
    }
    var status = stat()
    guard fstat(file.rawValue, &status) == 0, status.st_mode & S_IFMT == S_IFREG,
      status.st_size <= maximumJournalBytes
    else { return nil }
    var bytes = [UInt8](repeating: 0, count: Int(status.st_size))
    let count = bytes.withUnsafeMutableBytes { read(file.rawValue, $0.baseAddress, $0.count) }
    guard count == bytes.count, let text = String(validating: bytes, as: UTF8.self),
      bytes.starts(with: header.utf8), bytes.suffix(5).elementsEqual("\nend\n".utf8)
    else { return nil }
    var entries: [Entry] = []
    for line in text.utf8.split(separator: UInt8(ascii: "\n")).dropFirst().dropLast() {
      guard let entry = Entry(parsing: line) else { return nil }
      entries.append(entry)
    }
    let files = entries.map { FileList.File(path: $0.path, size: 0) }
    return (try? FileList(files)) == nil ? nil : entries
  }
}

extension FileSwitch.Entry {
  /// By bytes: a space and a combining mark after it are one character.
  fileprivate init?(parsing line: Substring.UTF8View) {
    let words = line.split(
      separator: UInt8(ascii: " "), maxSplits: 5, omittingEmptySubsequences: false
    ).map { Substring($0) }
    guard words.count == 6, let depth = Int(words[0]), let number = UInt64(words[1]),
      let seconds = Int(words[2]), let nanoseconds = Int(words[3]), let old = UInt64(words[4])
    else { return nil }
    self.init(
      path: String(words[5]),
      new: .init(number: number, seconds: seconds, nanoseconds: nanoseconds), old: old,
      depth: depth)
  }
}
