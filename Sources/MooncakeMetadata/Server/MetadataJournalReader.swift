import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem

/// Reads a metadata server's journal when it starts. Distinguishes the remains of a commit that was
/// never safe, and so never confirmed to a client, from damage to safe data.
struct MetadataJournalReader {
  private typealias Format = MetadataJournalFormat

  /// What a file holds.
  struct Contents {
    /// nil if the file has none or is of format 2.
    var head: MetadataJournalFormat.Head?
    var isFormer = false
    /// How many bytes of the file to keep.
    var byteCount = 0
    /// Whether the file says that everything in it was safe.
    var isMarked = false
    /// Why the bytes after that are not kept.
    var loss = ""
  }

  /// What was found at a position of the file.
  private enum Found {
    case record(Format.Header, MetadataJournal.Record, next: Int)
    /// A complete record of a kind that this version does not know.
    case unknown(kind: UInt8)
    /// Nothing, or only the beginning of a record, in the bytes loaded so far.
    case beginning
    /// Something no writer leaves behind, and what is wrong with it.
    case damage(String)
  }

  private let file: Int32
  private let path: String
  private let fileBytes: Int
  /// The end of the file without trailing zeros.
  private var end = 0
  /// The loaded bytes, and their position.
  private var bytes: [UInt8] = []
  private var start = 0
  /// nil: format 2.
  private var head: Format.Head?
  private static let loadBytes = 1 << 20
  private static let restore = "restore it from a copy, or"

  init(_ file: Int32, path: String, fileBytes: Int) {
    self.file = file
    self.path = path
    self.fileBytes = fileBytes
  }

  /// Passes every record to `replay` in order, which returns what is wrong with one that makes no
  /// sense.
  mutating func read(
    _ replay: (MetadataJournal.Record) -> String?
  ) throws(MooncakeError) -> Contents {
    let bytes = try load(0, min(fileBytes, Format.Head.byteCount))
    let first: Int
    switch bytes.withUnsafeBytes({ Format.readBeginning($0, fileBytes: fileBytes) }) {
    case .head(let head):
      self.head = head
      first = Format.Head.byteCount
    case .former(let next): first = next
    case .unfinished: return Contents()
    case .version(let version):
      throw refusal(
        at: 0, "it has format \(version), which another version of this server writes",
        "use that version, or")
    case .foreign: throw refusal(at: 0, "this is not how a journal begins")
    case .damage: throw refusal(at: 0, "its head does not match its checksum")
    }
    end = max(first, try endWithoutZeros())
    return try readRecords(from: first, replay)
  }

  private mutating func readRecords(
    from first: Int, _ replay: (MetadataJournal.Record) -> String?
  ) throws(MooncakeError) -> Contents {
    var contents = Contents(
      head: head, isFormer: head == nil, byteCount: first, isMarked: head?.safeBytes == first)
    var last: Format.Header?
    while true {
      let position = contents.byteCount
      switch found(at: position, after: last) {
      case .record(let header, let record, let next):
        if record != .mark, let problem = replay(record) { throw refusal(at: position, problem) }
        last = header
        contents.byteCount = next
        contents.isMarked = record == .mark || head?.safeBytes == next
      case .unknown(let kind):
        throw refusal(
          at: position,
          "this version does not know records of kind \(kind): a newer one may have written "
            + "it")
      case .beginning where start + bytes.count < end:
        let known = start + bytes.count
        bytes = try load(
          position, min(end - position, max(Self.loadBytes, 2 * (known - position))))
        start = position
      case .beginning:
        contents.loss = position < end ? "no whole record" : "only zeros"
        try checkWasNeverSafe(position, "the file ends here or in the record that begins here")
        return contents
      case .damage(let what):
        contents.loss = what
        if head == nil { throw refusal(at: position, what) }
        try checkWasNeverSafe(position, what)
        return contents
      }
    }
  }

  // MARK: Records

  private func found(at position: Int, after last: Format.Header?) -> Found {
    bytes.withUnsafeBytes { bytes in
      let headerBytes = head == nil ? Format.Header.formerByteCount : Format.Header.byteCount
      let left = bytes.count - (position - start)
      if left < headerBytes { return .beginning }
      let bytes = UnsafeRawBufferPointer(rebasing: bytes[(position - start)...])
      guard let header = Format.Header(bytes, at: position, of: head?.file) else {
        return .damage("the header of a record does not match its checksum")
      }
      let isNext = header.safeBytes == position || last.map(header.isSameCommit(as:)) ?? false
      if head != nil && !isNext {
        return .damage("a record belongs to another commit than those around it")
      }
      if header.length > left - headerBytes { return .beginning }
      let next = headerBytes + header.length
      let rest = UnsafeRawBufferPointer(rebasing: bytes[headerBytes..<next])
      guard Checksum.crc32(rest) == header.sum else {
        return .damage("a record of \(next) bytes does not match its checksum")
      }
      return Format.decode(rest).map { .record(header, $0, next: position + next) }
        ?? .unknown(kind: rest.first ?? 0)
    }
  }

  /// Throws if anything says that the bytes after a position were once safe.
  private func checkWasNeverSafe(_ position: Int, _ what: String) throws(MooncakeError) {
    guard let head else { return }
    let problem = "\(what), though it was safe on the disk according to byte"
    if position < head.safeBytes { throw refusal(at: position, "\(problem) 0") }
    if let proof = try proof(behind: position) {
      throw refusal(at: position, "\(problem) \(proof)")
    }
  }

  /// The position of a later record that says more was safe. A commit is written only when the
  /// previous one is safe, so an unsafe commit has no such record after it.
  private func proof(behind position: Int) throws(MooncakeError) -> Int? {
    guard let head else { return nil }
    let headerBytes = Format.Header.byteCount
    var from = position + 1
    while fileBytes - from >= headerBytes {
      let bytes = try load(from, min(fileBytes - from, Self.loadBytes))
      let offset = bytes.withUnsafeBytes { bytes in
        (0...(bytes.count - headerBytes)).first { offset in
          let bytes = UnsafeRawBufferPointer(rebasing: bytes[offset..<(offset + headerBytes)])
          return Format.Header.mayTell(bytes, safeBytes: (position + 1)...(from + offset))
            && Format.Header(bytes, at: from + offset, of: head.file) != nil
        }
      }
      if let offset { return from + offset }
      from += bytes.count - headerBytes + 1
    }
    return nil
  }

  // MARK: Bytes

  /// Where the trailing zeros of the file begin.
  private func endWithoutZeros() throws(MooncakeError) -> Int {
    var end = fileBytes
    while end > 0 {
      let bytes = try load(max(0, end - Self.loadBytes), min(end, Self.loadBytes))
      if let last = bytes.lastIndex(where: { $0 != 0 }) { return end - bytes.count + last + 1 }
      end -= bytes.count
    }
    return 0
  }

  /// Reads bytes of the file. It is not mapped, because a disk error would then end the process.
  private func load(_ offset: Int, _ count: Int) throws(MooncakeError) -> [UInt8] {
    do throws(Errno) {
      return try readWhole(offset, count)
    } catch {
      throw MooncakeError(
        .system, "metadata server: \(path): reading at byte \(offset): \(error)")
    }
  }

  private func readWhole(_ offset: Int, _ count: Int) throws(Errno) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    var done = 0
    while done < count {
      let more = try bytes.withUnsafeMutableBytes { buffer in
        Result { () throws(Errno) in
          try retryingInterrupts {
            pread(file, buffer.baseAddress! + done, count - done, off_t(offset + done))
          }
        }
      }.get()
      // The file was truncated meanwhile.
      if more == 0 { throw Errno(EIO) }
      done += more
    }
    return bytes
  }

  private func refusal(
    at offset: Int, _ found: String, _ advice: String = Self.restore
  ) -> MooncakeError {
    MooncakeError(
      .system,
      "metadata server: \(path): byte \(offset) of \(fileBytes): \(found); the file stays as it "
        + "is, and the server does not start, since it would lose what follows: \(advice) move the "
        + "file away to start empty (engines that run put their keys again)")
  }
}
