import CLinux
import Glibc
import MooncakeSystem

/// The changes of a metadata server in a file, so that a restart loses none. Each record is added
/// behind the others and synced before its request is answered; a file that has grown far beyond
/// its contents is written anew beside and renamed.
package final class MetadataJournal {
  /// One change.
  package enum Record: Equatable, Sendable {
    case put(key: String, value: [UInt8], lease: UInt64)
    case delete(key: String)
    case grant(lease: UInt64, ttlMilliseconds: UInt64)
    case revoke(lease: UInt64)
  }

  private let directory: FileDescriptor
  private let lockFile: FileDescriptor
  private var file: FileDescriptor
  private let path: String
  private var fileBytes: Int
  private var pending: [UInt8] = []
  /// A record could not be written: what follows makes no sense without it.
  private var isBehind = false
  /// The file as it was when it could not be written anew.
  private var failedFileBytes = 0
  private static let name = "journal"
  private static var head: [UInt8] { Array("mooncake metadata 1\n".utf8) }
  private static let slackBytes = 4 << 20

  /// Opens or creates the journal of a directory and reads every record of it in order. What a
  /// crash has left half-written at the end is cut off.
  package init(
    directory path: String, limits: MetadataLimits, _ replay: (Record) -> Void
  ) throws(EngineError) {
    self.path = path
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
    try read(limits, replay)
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

  private func read(
    _ limits: MetadataLimits, _ replay: (Record) -> Void
  ) throws(EngineError) {
    if fileBytes == 0 {
      pending = Self.head
      do throws(Errno) { try commit { [] } } catch { throw Self.failure(path, "\(error)") }
      return
    }
    // The bytes are parsed in place; their pages are the kernel's to take back.
    guard let start = mmap(nil, fileBytes, PROT_READ, MAP_PRIVATE, file.rawValue, 0),
      start != MAP_FAILED
    else { throw Self.failure(path, "\(Errno.current)") }
    let bytes = UnsafeRawBufferPointer(start: start, count: fileBytes)
    defer { munmap(start, bytes.count) }
    guard bytes.starts(with: Self.head) else {
      throw Self.failure(path, "the file is no journal: it is left as it is")
    }
    var position = Self.head.count
    while let (record, next) = Self.decode(bytes, position, limits) {
      replay(record)
      position = next
    }
    if position == fileBytes { return }
    Log.warning(
      "metadata server: \(path): the last \(fileBytes - position) bytes are no whole record, as "
        + "after a crash: cut off")
    if ftruncate(file.rawValue, position) != 0 { throw Self.failure(path, "\(Errno.current)") }
    fileBytes = position
  }

  private static func failure(_ path: String, _ cause: String) -> EngineError {
    EngineError(.system, "metadata server: \(path): \(cause)")
  }

  /// Adds a record; it is safe after the next `commit`.
  package func append(_ record: Record) { Self.encode(record, into: &pending) }

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
      if fdatasync(file.rawValue) != 0 { throw Errno.current }
    } catch {
      isBehind = true
      _ = ftruncate(file.rawValue, fileBytes)
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
      if fsync(new.rawValue) != 0 { throw Errno.current }
      if rename(newPath, path + "/" + Self.name) != 0 { throw Errno.current }
      file = new
      fileBytes = byteCount
    } catch {
      unlink(newPath)
      failedFileBytes = fileBytes
      throw error
    }
    // Until that is safe, too, a crash may bring the former file back.
    isBehind = fsync(directory.rawValue) != 0
    if isBehind { throw Errno.current }
  }

  /// Writes a whole file; returns its length.
  private static func write(
    _ records: some Sequence<Record>, to file: Int32
  ) throws(Errno) -> Int {
    var written = 0
    var bytes = head
    for record in records {
      encode(record, into: &bytes)
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

  // MARK: Records: length of the rest, checksum of it, kind, number, key length, key, value

  private static let headerBytes = 8
  private static let fixedBytes = 13

  private static func encode(_ record: Record, into bytes: inout [UInt8]) {
    let (kind, number, key, value): (UInt8, UInt64, String, [UInt8]) =
      switch record {
      case .put(let key, let value, let lease): (1, lease, key, value)
      case .delete(let key): (2, 0, key, [])
      case .grant(let lease, let ttl): (3, lease, "", Self.bytes(ttl, 8))
      case .revoke(let lease): (4, lease, "", [])
      }
    let start = bytes.count
    bytes += [UInt8](repeating: 0, count: headerBytes)
    bytes.append(kind)
    bytes += Self.bytes(number, 8)
    bytes += Self.bytes(UInt64(key.utf8.count), 4)
    bytes += Array(key.utf8)
    bytes += value
    let rest = bytes.count - start - headerBytes
    let sum = bytes.withUnsafeBytes {
      Checksum.crc32(UnsafeRawBufferPointer(rebasing: $0[(start + headerBytes)...]))
    }
    let header = Self.bytes(UInt64(rest), 4) + Self.bytes(UInt64(sum), 4)
    bytes.replaceSubrange(start..<(start + headerBytes), with: header)
  }

  private static func decode(
    _ bytes: UnsafeRawBufferPointer, _ position: Int, _ limits: MetadataLimits
  ) -> (Record, next: Int)? {
    guard bytes.count - position >= headerBytes + fixedBytes else { return nil }
    let length = Int(number(bytes, position, 4))
    let start = position + headerBytes
    guard length >= fixedBytes, length <= bytes.count - start else { return nil }
    let rest = UnsafeRawBufferPointer(rebasing: bytes[start..<(start + length)])
    guard UInt64(Checksum.crc32(rest)) == number(bytes, position + 4, 4) else { return nil }
    let keyCount = Int(number(rest, 9, 4))
    guard keyCount <= length - fixedBytes,
      let key = String(validating: rest[fixedBytes..<(fixedBytes + keyCount)], as: UTF8.self)
    else { return nil }
    let value = rest[(fixedBytes + keyCount)...]
    let lease = number(rest, 1, 8)
    let record: Record
    switch rest[0] {
    case 1: record = .put(key: key, value: Array(value), lease: lease)
    case 2: record = .delete(key: key)
    case 3 where value.count == 8:
      record = .grant(
        lease: lease, ttlMilliseconds: number(UnsafeRawBufferPointer(rebasing: value), 0, 8))
    case 4: record = .revoke(lease: lease)
    default: return nil
    }
    return (record, start + length)
  }

  private static func bytes(_ number: UInt64, _ count: Int) -> [UInt8] {
    (0..<count).map { UInt8(truncatingIfNeeded: number >> UInt64($0 * 8)) }
  }

  private static func number(
    _ bytes: UnsafeRawBufferPointer, _ position: Int, _ count: Int
  ) -> UInt64 {
    (0..<count).reduce(0) { $0 | UInt64(bytes[position + $1]) << UInt64($1 * 8) }
  }
}

/// The checksum of Ethernet and zip files.
enum Checksum {
  private static let table: [UInt32] = (0..<256).map { index in
    (0..<8).reduce(UInt32(index)) { sum, _ in
      sum & 1 == 0 ? sum >> 1 : sum >> 1 ^ 0xEDB8_8320
    }
  }

  static func prepare() { _ = table }

  static func crc32(_ bytes: UnsafeRawBufferPointer) -> UInt32 {
    let table = table
    return ~bytes.reduce(~0) { sum, byte in
      table[Int((sum ^ UInt32(byte)) & 0xFF)] ^ sum >> 8
    }
  }
}
