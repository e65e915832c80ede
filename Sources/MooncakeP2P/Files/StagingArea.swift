import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// The hidden directory of one get. Its file `lock` is locked while it is in use; `new` has the
/// files in their final tree, `old` the files that they replaced if the file system cannot exchange
/// two.
final class StagingArea {
  static let prefix = ".mooncake-get-"
  private static let lockName = "lock"

  /// The directory that the files are for.
  let target: Directory
  let directory: Directory
  let new: Directory
  let old: Directory
  private let name: String
  private let lock: FileDescriptor
  /// Must not be removed: it has files that could not be put back.
  var isKept = false

  private init(
    _ target: Directory, _ name: String, _ directory: Directory, _ lock: consuming FileDescriptor,
    isNew: Bool
  ) throws(Errno) {
    self.target = target
    self.name = name
    self.directory = directory
    self.lock = lock
    for part in ["new", "old"] {
      if try !directory.makeDirectory(part) && isNew { throw Errno(EEXIST) }
    }
    new = try directory.directory("new")
    old = try directory.directory("old")
  }

  /// Whether a name is reserved for such directories.
  static func isStaging(_ name: some StringProtocol) -> Bool {
    name.utf8.starts(with: prefix.utf8)
  }

  private static let randomDigits = 16

  /// Whether `make` could have chosen a name.
  private static func isMade(_ name: String) -> Bool {
    let digits = name.utf8.dropFirst(prefix.utf8.count)
    return isStaging(name) && digits.count == randomDigits
      && digits.allSatisfy { (48...57).contains($0) || (97...102).contains($0) }
  }

  /// Whether a directory belongs to the calling user and is closed to everybody else. A
  /// set-group-ID bit inherited from its parent does not matter.
  private static func isPrivate(_ status: stat) -> Bool {
    status.st_uid == geteuid() && status.st_mode & 0o5777 == 0o700
  }

  /// Makes one; nil if the target directory is gone.
  static func make(in target: Directory) throws(MooncakeError) -> StagingArea? {
    for _ in 0..<100 {
      let name = prefix + String(UInt64.random(in: (1 << 60) ... .max), radix: 16)
      do throws(Errno) {
        if try !target.makeDirectory(name, mode: 0o700) { continue }
      } catch {
        if error.rawValue == ENOENT { return nil }
        throw failure(target, error)
      }
      do throws(Errno) {
        let directory = try target.directory(name)
        if try isUntouched(directory) {
          if let area = try take(target, name, directory) { return area }
          continue
        }
      } catch {
        // Another get took it for a leftover and removed it.
        if error.rawValue == ENOENT { continue }
        throw failure(target, error)
      }
      target.removeDirectory(name)
      throw MooncakeError(
        .accessDenied,
        "\(target.path): \(name), just made there, is not an empty directory for its user alone: "
          + "somebody has put another one in its place, or the file system keeps no owners and "
          + "modes; choose another directory")
    }
    throw failure(target, Errno(EEXIST))
  }

  private static func failure(_ target: Directory, _ error: Errno) -> MooncakeError {
    FileFailure.error(target.path, error, "making a directory in it")
  }

  /// Whether a directory is still as `make` made it. Anyone who may rename entries of the target
  /// could replace it before it is opened.
  private static func isUntouched(_ directory: Directory) throws(Errno) -> Bool {
    let isOwn = isPrivate(try directory.status())
    // A file server may change the owner of what its clients make.
    if !isOwn && linux_is_shared_system(directory.number) == 0 { return false }
    return try directory.isEmpty()
  }

  /// Locks a new directory; nil if another get took it for a leftover first.
  private static func take(
    _ target: Directory, _ name: String, _ directory: Directory
  ) throws(Errno) -> StagingArea? {
    do throws(Errno) { return try lock(target, name, directory) } catch {
      // Half made, nobody would recognize it as a leftover.
      directory.clear()
      target.removeDirectory(name)
      throw error
    }
  }

  private static func lock(
    _ target: Directory, _ name: String, _ directory: Directory
  ) throws(Errno) -> StagingArea? {
    let lock = try directory.file(lockName, flags: O_RDWR | O_CREAT | O_EXCL)
    // Where nothing can be locked, nothing is taken for a leftover either.
    if flock(lock.rawValue, LOCK_EX | LOCK_NB) != 0 && Errno.current == .wouldBlock { return nil }
    var status = stat()
    if fstat(lock.rawValue, &status) != 0 || status.st_nlink == 0 { return nil }
    let text = lockText(of: try directory.status())
    let count = try retryingInterrupts {
      text.withUnsafeBytes { write(lock.rawValue, $0.baseAddress, $0.count) }
    }
    if count != text.count { throw Errno(ENOSPC) }
    return try StagingArea(target, name, directory, lock, isNew: true)
  }

  /// Lets it be recognized as a leftover even after a loss of power.
  func syncLock(_ sync: DiskSync) throws(Errno) { try sync(lock.rawValue) }

  /// Removes the whole directory.
  func remove() {
    if isKept { return }
    directory.clear(except: Self.lockName)
    directory.remove(Self.lockName)
    target.removeDirectory(name)
  }

  // MARK: Leftovers

  /// Removes what killed processes have left, and nothing else: directories of the calling user,
  /// closed to others, with a lock file that names them and that nobody holds. `holdsSwitch`:
  /// nobody else moves files into place, so interrupted switches are undone.
  static func removeLeftovers(in target: Directory, holdsSwitch: Bool) {
    guard let device = try? target.status().st_dev else { return }
    for name in target.names() where isMade(name) {
      guard let directory = try? target.directory(name), let status = try? directory.status(),
        isPrivate(status), status.st_dev == device
      else { continue }
      let lock: FileDescriptor
      do throws(Errno) {
        lock = try directory.file(lockName, flags: O_RDWR | O_NONBLOCK | O_NOCTTY)
      } catch {
        // Killed before it made a lock; removed only if empty.
        if error.rawValue == ENOENT { target.removeDirectory(name) }
        continue
      }
      var file = stat()
      guard fstat(lock.rawValue, &file) == 0, file.st_mode & S_IFMT == S_IFREG,
        file.st_uid == geteuid(), isLock(lock, of: status),
        flock(lock.rawValue, LOCK_EX | LOCK_NB) == 0
      else { continue }
      reclaim(target, name, directory, lock, holdsSwitch)
    }
  }

  private static let lockHeader = "mooncake-get 1"

  /// The contents of a directory's lock file, so that a foreign directory of such a name with a
  /// file `lock` is not taken for a leftover.
  private static func lockText(of directory: stat) -> [UInt8] {
    Array("\(lockHeader)\n\(directory.st_ino)\n\(directory.st_dev)\n".utf8) + bootNumber()
  }

  private static func isLock(_ lock: borrowing FileDescriptor, of directory: stat) -> Bool {
    var bytes = [UInt8](repeating: 0, count: 256)
    let count = bytes.withUnsafeMutableBytes { pread(lock.rawValue, $0.baseAddress, $0.count, 0) }
    func lines(_ text: some Sequence<UInt8>) -> [[UInt8]] {
      Array(text).split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        .map { Array($0) }
    }
    let found = lines(bytes.prefix(max(0, count)))
    let own = lines(lockText(of: directory))
    guard found.count == own.count, found[..<2] == own[..<2] else { return false }
    if !bootNumber().isEmpty && found[3...] == own[3...] { return found[2] == own[2] }
    // After a reboot, devices may have other numbers. On a file system shared by machines, a lock
    // may be known only to the machine that took it, and only since its boot.
    return linux_is_shared_system(lock.rawValue) == 0
  }

  /// Unique to this machine and boot.
  private static func bootNumber() -> [UInt8] {
    let path = "/proc/sys/kernel/random/boot_id"
    guard let file = try? FileDescriptor.open(path, flags: O_RDONLY) else { return [] }
    var bytes = [UInt8](repeating: 0, count: 64)
    let count = bytes.withUnsafeMutableBytes { read(file.rawValue, $0.baseAddress, $0.count) }
    return Array(bytes.prefix(max(0, count)))
  }

  private static func reclaim(
    _ target: Directory, _ name: String, _ directory: Directory, _ lock: consuming FileDescriptor,
    _ holdsSwitch: Bool
  ) {
    if FileSwitch.isBroken(in: directory) {
      if !holdsSwitch { return }
      guard let area = try? StagingArea(target, name, directory, lock, isNew: false),
        FileSwitch.recover(area)
      else {
        Log.warning(
          "\(directory.path): a get was killed while it put files into their places, and other "
            + "files are there now. What it replaced is in this directory: look through it, then "
            + "remove it")
        return
      }
      area.remove()
      return
    }
    directory.clear(except: lockName)
    directory.remove(lockName)
    target.removeDirectory(name)
  }
}

/// Lets one get at a time put its files in place in a directory.
struct SwitchLock: ~Copyable {
  private let directory: Directory

  private static let limitMilliseconds: UInt64 = 60_000

  private init(_ directory: Directory) { self.directory = directory }

  deinit { flock(directory.number, LOCK_UN) }

  /// nil if another process holds it. On a file system without such locks, everybody gets it.
  static func tryTaking(_ directory: Directory) -> SwitchLock? {
    if flock(directory.number, LOCK_EX | LOCK_NB) != 0 && Errno.current == .wouldBlock {
      return nil
    }
    return SwitchLock(directory)
  }

  /// Waits for it within the bounds.
  static func take(_ directory: Directory, _ bounds: Bounds?) throws(MooncakeError) -> SwitchLock {
    let deadline = Deadline.after(milliseconds: limitMilliseconds)
    while true {
      if let lock = tryTaking(directory) { return lock }
      try bounds?.check("waiting for another get to put its files into \(directory.path)")
      if deadline.hasPassed {
        throw MooncakeError(
          .busy,
          "\(directory.path): another process has had it locked for \(limitMilliseconds / 1000) s: "
            + "get again when that is done, or choose another directory")
      }
      sleepBriefly(nanoseconds: 5_000_000)
    }
  }
}
