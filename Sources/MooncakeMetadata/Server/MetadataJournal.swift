import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem

/// A metadata server's changes in a file, so that a restart loses none. Each record is appended and
/// synced before its request is answered, and a commit is written only when the previous one is
/// safe. A file much larger than its live contents is replaced by a new one through a rename.
package final class MetadataJournal {
  package typealias Record = MetadataJournalFormat.Record

  /// The system calls that make files safe; tests replace them by slow and failing disks.
  package struct Disk: Sendable {
    package var syncData: @Sendable (Int32) -> Int32 = { fdatasync($0) }
    package var sync: @Sendable (Int32) -> Int32 = { fsync($0) }
    package var truncate: @Sendable (Int32, Int) -> Int32 = { ftruncate($0, $1) }

    package init() {}
  }

  private let directory: FileDescriptor
  private let lockFile: FileDescriptor
  private var file: FileDescriptor
  private let path: String
  private let disk: Disk
  private var fileBytes: Int
  /// Of these, the synced ones.
  private var safeBytes = 0
  private var head = MetadataJournalFormat.Head(file: .random(in: 0 ... .max))
  /// Distinguishes what this run of the server has written from what earlier runs left.
  private let run = UInt32.random(in: 0 ... .max)
  private var pending: [Record] = []
  /// Records are missing from the file, or it has an old format, so the next commit rewrites it.
  private var isBehind = false
  /// Size of the file when the last rewrite failed.
  private var failedFileBytes = 0
  private static let name = "journal"
  private static let slackBytes = 4 << 20
  private static let chunkBytes = 1 << 20
  /// Limit on records that could not be written and wait for the next attempt.
  private static let heldBytes = 4 << 20
  private var pendingBytes = 0
  /// How many of them the last failed write included.
  private var triedCount = 0
  /// The last write's error, and when to try again.
  private var lastError = Errno(EIO)
  private var nextAttempt: UInt64 = 0
  private static let pauseNanoseconds: UInt64 = 1_000_000_000

  /// Opens or creates the journal of a directory and reads its records in order; `replay` returns
  /// what is wrong with a record that makes no sense. A damaged last commit that was never safe, as
  /// after a crash, is cut off. Any other damage is an error, and the file stays as it is.
  package init(
    directory path: String, disk: Disk = Disk(), _ replay: (Record) -> String?
  ) throws(MooncakeError) {
    self.path = path
    self.disk = disk
    if mkdir(path, 0o700) != 0 && Errno.current.rawValue != EEXIST {
      throw Self.failure(path, "\(Errno.current)")
    }
    // From here on use the open directory, even if the host changes its directory or the path
    // moves.
    directory = try Self.open(path, in: AT_FDCWD, path, flags: O_RDONLY | O_DIRECTORY)
    lockFile = try Self.open(path, in: directory.rawValue, "lock", flags: O_RDWR | O_CREAT)
    if flock(lockFile.rawValue, LOCK_EX | LOCK_NB) != 0 {
      throw Self.failure(path, "another server uses it: \(Errno.current)")
    }
    file = try Self.open(path, in: directory.rawValue, Self.name, flags: O_RDWR | O_CREAT)
    var status = stat()
    if fstat(file.rawValue, &status) != 0 { throw Self.failure(path, "\(Errno.current)") }
    fileBytes = Int(status.st_size)
    if fileBytes > 0 { try start(replay) }
    if fileBytes == 0 { try create() }
  }

  /// Unlocks explicitly: closing is not enough while a forked child has the file open. The child
  /// itself never gets here, since its handles are void.
  deinit { _ = flock(lockFile.rawValue, LOCK_UN) }

  private static func open(
    _ path: String, in directory: Int32, _ name: String, flags: Int32
  ) throws(MooncakeError) -> FileDescriptor {
    do throws(Errno) {
      return try FileDescriptor.open(name, in: directory, flags: flags)
    } catch {
      throw failure(path, "\(name == path ? "" : "\(name): ")\(error)")
    }
  }

  private static func failure(_ path: String, _ cause: String) -> MooncakeError {
    MooncakeError(.system, "metadata server: \(path): \(cause)")
  }

  // MARK: Start

  /// Reads what an earlier run has left.
  private func start(_ replay: (Record) -> String?) throws(MooncakeError) {
    var reader = MetadataJournalReader(
      file.rawValue, path: path + "/" + Self.name, fileBytes: fileBytes)
    let contents = try reader.read(replay)
    try cut(to: contents)
    if fileBytes == 0 { return }
    // An earlier process may have written it but not synced it.
    if disk.syncData(file.rawValue) != 0 {
      throw Self.failure(path, "syncing \(Self.name): \(Errno.current)")
    }
    safeBytes = fileBytes
    try syncNames()
    isBehind = contents.isFormer
    guard let head = contents.head else { return }
    self.head = head
    if !contents.isMarked { mark() }
  }

  /// Writes the head of an empty file.
  private func create() throws(MooncakeError) {
    do throws(Errno) {
      try Self.write(head.bytes, to: file.rawValue, at: 0)
      if disk.syncData(file.rawValue) != 0 { throw Errno.current }
    } catch {
      throw Self.failure(path, "making the journal: \(error)")
    }
    fileBytes = head.safeBytes
    safeBytes = fileBytes
    try syncNames()
  }

  /// Makes the names of file and directory as safe as the file.
  private func syncNames() throws(MooncakeError) {
    do throws(Errno) {
      try syncDirectory(directory.rawValue)
      // If this user may not read the parent, it did not create the directory either.
      let parent = try? FileDescriptor.open(
        "..", in: directory.rawValue, flags: O_RDONLY | O_DIRECTORY)
      guard let parent else { return }
      try syncDirectory(parent.rawValue)
    } catch {
      throw Self.failure(path, "making the journal: \(error)")
    }
  }

  private func syncDirectory(_ directory: Int32) throws(Errno) {
    if disk.sync(directory) == 0 { return }
    let error = Errno.current
    // Some file systems cannot sync directories and do not need to.
    if error.rawValue != EINVAL { throw error }
  }

  /// Cuts off what a crash has left half-written.
  private func cut(to contents: MetadataJournalReader.Contents) throws(MooncakeError) {
    let keptBytes = contents.byteCount
    if keptBytes == fileBytes { return }
    let lostBytes = fileBytes - keptBytes
    if disk.truncate(file.rawValue, keptBytes) != 0 {
      throw Self.failure(path, "cutting \(Self.name) to \(keptBytes) bytes: \(Errno.current)")
    }
    fileBytes = keptBytes
    Log.warning(
      "metadata server: \(path)/\(Self.name): "
        + (keptBytes == 0
          ? "it holds \(lostBytes) bytes and no whole head, as after a crash while it was made: "
            + "made anew"
          : "the last \(lostBytes) bytes, from byte \(keptBytes) on, are what a crash left of "
            + "changes that nobody was told of (\(contents.loss)): cut off"))
  }

  // MARK: Changes

  /// Adds a record; it is safe after the next `commit`.
  package func append(_ record: Record) {
    pending.append(record)
    if case .put(let key, let value, _) = record { pendingBytes += key.utf8.count + value.count }
    pendingBytes += 64
  }

  package var hasPending: Bool { !pending.isEmpty }

  /// Makes the added records safe. After an error none of them is, and the file is as before. If
  /// writing failed, as on a full disk, they are written with the next records. If syncing failed,
  /// any part may be lost, so the next commit writes the whole contents to a new file.
  package func commit(_ contents: () -> [Record]) throws(Errno) {
    if pending.isEmpty { return }
    if isBehind { return try catchUp(contents) }
    if pending.count == triedCount && Clock.now() < nextAttempt { throw lastError }
    let end: Int
    do throws(Errno) {
      end = try Self.write(pending, to: file.rawValue, at: fileBytes, of: commit(head, safeBytes))
    } catch {
      if disk.truncate(file.rawValue, fileBytes) != 0 || pendingBytes > Self.heldBytes {
        isBehind = true
        drop()
      } else {
        // Without new records, wait before the next attempt: reads call this too.
        (triedCount, lastError) = (pending.count, error)
        nextAttempt = Clock.now() &+ Self.pauseNanoseconds
      }
      throw error
    }
    drop()
    if disk.syncData(file.rawValue) != 0 {
      let error = Errno.current
      isBehind = true
      _ = disk.truncate(file.rawValue, fileBytes)
      throw error
    }
    fileBytes = end
    safeBytes = end
    mark()
  }

  private func drop() {
    pending = []
    pendingBytes = 0
    triedCount = 0
  }

  /// Rewrites the whole file; after a failure, not again before a pause.
  private func catchUp(_ contents: () -> [Record]) throws(Errno) {
    drop()
    if Clock.now() < nextAttempt { throw lastError }
    do throws(Errno) {
      try rewrite(contents())
    } catch {
      lastError = error
      nextAttempt = Clock.now() &+ Self.pauseNanoseconds
      throw error
    }
  }

  /// Appends a mark that everything before is safe. It is not synced: if it is lost, the next
  /// commit says the same.
  private func mark() {
    do throws(Errno) {
      fileBytes = try Self.write(
        [.mark], to: file.rawValue, at: fileBytes, of: commit(head, safeBytes))
    } catch {}
  }

  private func commit(
    _ head: MetadataJournalFormat.Head, _ safeBytes: Int
  ) -> MetadataJournalFormat.Commit {
    MetadataJournalFormat.Commit(file: head.file, run: run, safeBytes: safeBytes)
  }

  /// Whether most of the file is outdated.
  package func isWorthRewriting(liveBytes: Int) -> Bool {
    fileBytes > max(failedFileBytes, liveBytes * 2) + Self.slackBytes
  }

  /// Replaces the file by one with only the given records. After an error the file is as before.
  package func rewrite(_ records: [Record]) throws(Errno) {
    let newName = Self.name + ".new"
    let directory = self.directory.rawValue
    do throws(Errno) {
      let new = try FileDescriptor.open(
        newName, in: directory, flags: O_RDWR | O_CREAT | O_TRUNC)
      var head = MetadataJournalFormat.Head(file: .random(in: 0 ... .max))
      head.safeBytes = try Self.write(
        records, to: new.rawValue, at: head.safeBytes, of: commit(head, head.safeBytes))
      try Self.write(head.bytes, to: new.rawValue, at: 0)
      if disk.sync(new.rawValue) != 0 { throw Errno.current }
      if renameat(directory, newName, directory, Self.name) != 0 { throw Errno.current }
      file = new
      fileBytes = head.safeBytes
      safeBytes = fileBytes
      self.head = head
    } catch {
      unlinkat(directory, newName, 0)
      failedFileBytes = fileBytes
      throw error
    }
    // Until the rename is synced, a crash may bring the old file back.
    isBehind = true
    try syncDirectory(directory)
    isBehind = false
  }

  /// Appends records at `offset`; returns where they end.
  private static func write(
    _ records: [Record], to file: Int32, at offset: Int, of commit: MetadataJournalFormat.Commit
  ) throws(Errno) -> Int {
    var end = offset
    var bytes: [UInt8] = []
    for record in records {
      MetadataJournalFormat.encode(record, at: end + bytes.count, of: commit, into: &bytes)
      if bytes.count < Self.chunkBytes { continue }
      try write(bytes, to: file, at: end)
      end += bytes.count
      bytes.removeAll(keepingCapacity: true)
    }
    try write(bytes, to: file, at: end)
    return end + bytes.count
  }

  private static func write(_ bytes: [UInt8], to file: Int32, at offset: Int) throws(Errno) {
    var done = 0
    while done < bytes.count {
      done += try bytes.withUnsafeBytes { buffer in
        Result { () throws(Errno) in
          try withoutWriteSignals { () throws(Errno) in
            try retryingInterrupts {
              pwrite(file, buffer.baseAddress! + done, buffer.count - done, offset + done)
            }
          }
        }
      }.get()
    }
  }
}
