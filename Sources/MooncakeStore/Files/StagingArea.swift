import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem

/// The hidden directory of one get. The file `lock` in it is locked while it is in use; `new` has
/// the files in the tree that they will have, `old` those that they replaced where the file system
/// cannot exchange two.
final class StagingArea {
  static let prefix = ".mooncake-get-"
  private static let lockName = "lock"

  /// What the files are for.
  let target: Directory
  let directory: Directory
  let new: Directory
  let old: Directory
  private let name: String
  private let lock: FileDescriptor
  /// Not to be removed: it has what could not be put back.
  var isKept = false

  private init(
    _ target: Directory, _ name: String, _ directory: Directory, _ lock: consuming FileDescriptor
  ) throws(Errno) {
    self.target = target
    self.name = name
    self.directory = directory
    self.lock = lock
    _ = try directory.makeDirectory("new")
    _ = try directory.makeDirectory("old")
    new = try directory.directory("new")
    old = try directory.directory("old")
  }

  /// Whether a name is that of a directory in use here, or left by a process that was killed.
  static func isStaging(_ name: some StringProtocol) -> Bool {
    name.utf8.starts(with: prefix.utf8)
  }

  /// Makes one; nil if the directory that it was to be in is gone.
  static func make(in target: Directory) throws(EngineError) -> StagingArea? {
    do throws(Errno) {
      for _ in 0..<100 {
        let name = prefix + String(UInt64.random(in: (1 << 60) ... .max), radix: 16)
        do throws(Errno) {
          if try !target.makeDirectory(name, mode: 0o700) { continue }
        } catch {
          if error.rawValue == ENOENT { return nil }
          throw error
        }
        if let area = try take(target, name) { return area }
      }
      throw Errno(EEXIST)
    } catch {
      throw FileFailure.error(target.path, error, "making a directory in it")
    }
  }

  /// Locks a new directory; nil if somebody who looks for leftovers was faster.
  private static func take(_ target: Directory, _ name: String) throws(Errno) -> StagingArea? {
    do throws(Errno) {
      let directory = try target.directory(name)
      let lock = try directory.file(lockName, flags: O_RDWR | O_CREAT | O_EXCL)
      // Where nothing can be locked, nothing is taken for a leftover either.
      if flock(lock.rawValue, LOCK_EX | LOCK_NB) != 0 && Errno.current == .wouldBlock { return nil }
      var status = stat()
      if fstat(lock.rawValue, &status) != 0 || status.st_nlink == 0 { return nil }
      let boot = bootNumber()
      _ = boot.withUnsafeBytes { write(lock.rawValue, $0.baseAddress, $0.count) }
      return try StagingArea(target, name, directory, lock)
    } catch {
      if error.rawValue == ENOENT { return nil }
      throw error
    }
  }

  /// Removes all of it.
  func remove() {
    if isKept { return }
    directory.clear(except: Self.lockName)
    directory.remove(Self.lockName)
    target.removeDirectory(name)
  }

  // MARK: Leftovers

  /// Removes what processes have left that were killed, and nothing else: directories of the
  /// calling user that nobody else can write into, with a lock that nobody holds.
  /// `holdsSwitch`: nobody else puts files into their places; switches that broke off are undone.
  static func removeLeftovers(in target: Directory, holdsSwitch: Bool) {
    guard let device = try? target.status().st_dev else { return }
    for name in target.names() where isStaging(name) {
      guard let directory = try? target.directory(name), let status = try? directory.status(),
        status.st_uid == geteuid(), status.st_mode & 0o022 == 0, status.st_dev == device
      else { continue }
      let lock: FileDescriptor
      do throws(Errno) {
        lock = try directory.file(lockName, flags: O_RDWR | O_NONBLOCK | O_NOCTTY)
      } catch {
        // Killed before there was one; goes only if it is empty.
        if error.rawValue == ENOENT { target.removeDirectory(name) }
        continue
      }
      var file = stat()
      guard fstat(lock.rawValue, &file) == 0, file.st_mode & S_IFMT == S_IFREG,
        file.st_uid == geteuid(), isOfThisMachine(lock),
        flock(lock.rawValue, LOCK_EX | LOCK_NB) == 0
      else { continue }
      reclaim(target, name, directory, lock, holdsSwitch)
    }
  }

  /// On a file system that other machines see, a lock may be known to its own machine only: there
  /// the file must tell of this one, since it was started.
  private static func isOfThisMachine(_ lock: borrowing FileDescriptor) -> Bool {
    if linux_is_shared_system(lock.rawValue) == 0 { return true }
    var bytes = [UInt8](repeating: 0, count: 64)
    let count = bytes.withUnsafeMutableBytes { pread(lock.rawValue, $0.baseAddress, $0.count, 0) }
    return count > 0 && Array(bytes.prefix(count)) == bootNumber()
  }

  /// What no other machine has, and this one until it is started again.
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
      guard let area = try? StagingArea(target, name, directory, lock),
        FileSwitch.recover(area)
      else {
        Log.warning(
          "\(directory.path): a get was killed while it put files into their places, and others "
            + "have come there since; what it replaced is left in there: look through it, then "
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

/// Lets one get at a time put files into the places of a directory.
struct SwitchLock: ~Copyable {
  private let directory: Directory

  private static let limitMilliseconds: UInt64 = 60_000

  private init(_ directory: Directory) { self.directory = directory }

  deinit { flock(directory.number, LOCK_UN) }

  /// nil if another holds it. A file system without such locks lets everybody have it.
  static func tryTaking(_ directory: Directory) -> SwitchLock? {
    if flock(directory.number, LOCK_EX | LOCK_NB) != 0 && Errno.current == .wouldBlock {
      return nil
    }
    return SwitchLock(directory)
  }

  /// Waits for it, within bounds.
  static func take(_ directory: Directory, _ bounds: Bounds?) throws(EngineError) -> SwitchLock {
    let deadline = Deadline.after(milliseconds: limitMilliseconds)
    while true {
      if let lock = tryTaking(directory) { return lock }
      try bounds?.check("waiting for another get to put its files into \(directory.path)")
      if deadline.hasPassed {
        throw EngineError(
          .busy,
          "\(directory.path): another process has had it locked for \(limitMilliseconds / 1000) s: "
            + "get again when that is done, or choose another directory")
      }
      sleepBriefly(nanoseconds: 5_000_000)
    }
  }
}
