import CLinux
import Glibc
import MooncakeSystem

/// The changes of a metadata server in a file, so that a restart loses none. Each record is added
/// behind the others and synced before its request is answered; a file that has grown far beyond
/// its contents is written anew beside and renamed.
package final class MetadataJournal {
  package typealias Record = MetadataJournalFormat.Record

  /// How files are made safe; tests put slow and failing disks here.
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
  private var pending: [UInt8] = []
  /// A record could not be written: what follows makes no sense without it.
  private var isBehind = false
  /// The file as it was when it could not be written anew.
  private var failedFileBytes = 0
  private static let name = "journal"
  private static let slackBytes = 4 << 20
  private static let loadBytes = 1 << 20
  private static let restore = "restore it from a copy, or"

  /// Opens or creates the journal of a directory and reads every record of it in order; `replay`
  /// says what is wrong with one that makes no sense. What a crash has left half-written at the end
  /// is cut off. Anything else that is wrong is an error, and the file stays as it is.
  package init(
    directory path: String, disk: Disk = Disk(), _ replay: (Record) -> String?
  ) throws(EngineError) {
    self.path = path
    self.disk = disk
    if mkdir(path, 0o700) != 0 && Errno.current.rawValue != EEXIST {
      throw Self.failure(path, "\(Errno.current)")
    }
    directory = try Self.open(path, flags: O_RDONLY | O_DIRECTORY)
    lockFile = try Self.open(path + "/lock", flags: O_RDWR | O_CREAT)
    if flock(lockFile.rawValue, LOCK_EX | LOCK_NB) != 0 {
      throw Self.failure(path, "another server uses it: \(Errno.current)")
    }
    file = try Self.open(path + "/" + Self.name, flags: O_RDWR | O_CREAT)
    var status = stat()
    if fstat(file.rawValue, &status) != 0 { throw Self.failure(path, "\(Errno.current)") }
    fileBytes = Int(status.st_size)
    if fileBytes > 0 {
      try cut(to: read(replay))
      // A former process may have written it and not have come to sync it.
      if disk.syncData(file.rawValue) != 0 {
        throw Self.failure(path, "syncing \(Self.name): \(Errno.current)")
      }
    }
    try create()
  }

  /// Closing alone would not do while a child of a fork has the file open. That child never ends
  /// the journal itself: what it inherits is behind handles that it has lost.
  deinit { _ = flock(lockFile.rawValue, LOCK_UN) }

  private static func open(_ path: String, flags: Int32) throws(EngineError) -> FileDescriptor {
    do throws(Errno) {
      return try FileDescriptor.open(path, flags: flags)
    } catch {
      throw failure(path, "\(error)")
    }
  }

  private static func failure(_ path: String, _ cause: String) -> EngineError {
    EngineError(.system, "metadata server: \(path): \(cause)")
  }

  // MARK: Start

  /// Writes the head of an empty file, and makes the names of file and directory as safe as it.
  private func create() throws(EngineError) {
    if fileBytes == 0 { pending = MetadataJournalFormat.head }
    do throws(Errno) {
      try commit { [] }
      try syncDirectory(directory.rawValue)
      // It may be closed to this user, who then has not made the directory either.
      guard let parent = try? FileDescriptor.open(path + "/..", flags: O_RDONLY | O_DIRECTORY)
      else { return }
      try syncDirectory(parent.rawValue)
    } catch {
      throw Self.failure(path, "making the journal: \(error)")
    }
  }

  private func syncDirectory(_ directory: Int32) throws(Errno) {
    if disk.sync(directory) == 0 { return }
    let error = Errno.current
    // Some file systems have nothing to sync there.
    if error.rawValue != EINVAL { throw error }
  }

  /// Hands every record over; returns how many bytes of the file are good.
  private func read(_ replay: (Record) -> String?) throws(EngineError) -> Int {
    let end = try endWithoutZeros()
    var start = 0
    var bytes = try load(0, min(end, Self.loadBytes))
    let head = bytes.withUnsafeBytes { MetadataJournalFormat.readHead($0, fileBytes: fileBytes) }
    var position: Int
    switch head {
    case .present(let next): position = next
    case .unfinished: return 0
    case .version(let version):
      throw refusal(
        at: 0, "it has format \(version), which another version of this server writes",
        "use that version, or")
    case .foreign: throw refusal(at: 0, "this is not how a journal begins", Self.restore)
    }
    while true {
      let found = bytes.withUnsafeBytes { MetadataJournalFormat.read($0, at: position - start) }
      switch found {
      case .record(let record, let next):
        if let problem = replay(record) { throw refusal(at: position, problem, Self.restore) }
        position = start + next
      case .damage(let what): throw refusal(at: position, what, Self.restore)
      case .beginning:
        let known = start + bytes.count
        if known == end { return position }
        bytes = try load(
          position, min(end - position, max(Self.loadBytes, 2 * (known - position))))
        start = position
      }
    }
  }

  /// Where the zeros begin in which the file ends, if it does.
  private func endWithoutZeros() throws(EngineError) -> Int {
    var end = fileBytes
    while end > 0 {
      let bytes = try load(max(0, end - Self.loadBytes), min(end, Self.loadBytes))
      if let last = bytes.lastIndex(where: { $0 != 0 }) { return end - bytes.count + last + 1 }
      end -= bytes.count
    }
    return 0
  }

  /// Bytes of the file. They are not mapped, since a disk's error would end the process.
  private func load(_ offset: Int, _ count: Int) throws(EngineError) -> [UInt8] {
    let descriptor = file.rawValue
    do throws(Errno) {
      return try readWhole(descriptor, offset, count)
    } catch {
      throw Self.failure(path, "reading \(Self.name) at byte \(offset): \(error)")
    }
  }

  private func readWhole(
    _ descriptor: Int32, _ offset: Int, _ count: Int
  ) throws(Errno) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    var done = 0
    while done < count {
      let more = try bytes.withUnsafeMutableBytes { buffer in
        Result { () throws(Errno) in
          try retryingInterrupts {
            pread(descriptor, buffer.baseAddress! + done, count - done, off_t(offset + done))
          }
        }
      }.get()
      // Somebody has cut the file.
      if more == 0 { throw Errno(EIO) }
      done += more
    }
    return bytes
  }

  private func refusal(at offset: Int, _ found: String, _ advice: String) -> EngineError {
    EngineError(
      .system,
      "metadata server: \(path)/\(Self.name): byte \(offset) of \(fileBytes): \(found); the file "
        + "stays as it is, and the server does not start, since it would lose what follows: "
        + "\(advice) move the file away to start empty (engines that run put their keys again)")
  }

  /// Drops what a crash has left half-written.
  private func cut(to keptBytes: Int) throws(EngineError) {
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
          : "the last \(lostBytes) bytes are no whole record, as after a crash: cut off"))
  }

  // MARK: Changes

  /// Adds a record; it is safe after the next `commit`.
  package func append(_ record: Record) { MetadataJournalFormat.encode(record, into: &pending) }

  package var hasPending: Bool { !pending.isEmpty }

  /// Makes what was added safe. After an error none of it is, and the file is as before; then the
  /// next one writes it anew from the whole contents, so that nothing is missing in between.
  package func commit(_ contents: () -> [Record]) throws(Errno) {
    if pending.isEmpty { return }
    defer { pending.removeAll(keepingCapacity: pending.count < 1 << 20) }
    if isBehind {
      try rewrite(contents())
      return
    }
    do throws(Errno) {
      try Self.write(pending, to: file.rawValue, at: fileBytes)
      if disk.syncData(file.rawValue) != 0 { throw Errno.current }
    } catch {
      isBehind = true
      _ = disk.truncate(file.rawValue, fileBytes)
      throw error
    }
    fileBytes += pending.count
  }

  /// Whether the file is mostly history.
  package func isWorthRewriting(liveBytes: Int) -> Bool {
    fileBytes > max(failedFileBytes, liveBytes * 2) + Self.slackBytes
  }

  /// Replaces the file by one that says the same in fewer records. After an error it is as before.
  package func rewrite(_ records: some Sequence<Record>) throws(Errno) {
    let newPath = path + "/" + Self.name + ".new"
    do throws(Errno) {
      let new = try FileDescriptor.open(newPath, flags: O_RDWR | O_CREAT | O_TRUNC)
      let byteCount = try Self.write(records, to: new.rawValue)
      if disk.sync(new.rawValue) != 0 { throw Errno.current }
      if rename(newPath, path + "/" + Self.name) != 0 { throw Errno.current }
      file = new
      fileBytes = byteCount
    } catch {
      unlink(newPath)
      failedFileBytes = fileBytes
      throw error
    }
    // Until that is safe, too, a crash may bring the former file back.
    isBehind = true
    try syncDirectory(directory.rawValue)
    isBehind = false
  }

  /// Writes a whole file; returns its length.
  private static func write(
    _ records: some Sequence<Record>, to file: Int32
  ) throws(Errno) -> Int {
    var written = 0
    var bytes = MetadataJournalFormat.head
    for record in records {
      MetadataJournalFormat.encode(record, into: &bytes)
      if bytes.count < 1 << 20 { continue }
      try write(bytes, to: file, at: written)
      written += bytes.count
      bytes.removeAll(keepingCapacity: true)
    }
    try write(bytes, to: file, at: written)
    return written + bytes.count
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
