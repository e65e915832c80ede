import Glibc
import MooncakeMetadata
import MooncakeSystem

/// A folder for a journal, removed at the end.
final class JournalFolder: Sendable {
  let path: String

  init() {
    var template = Array("/tmp/journal-XXXXXX".utf8CString)
    path = template.withUnsafeMutableBufferPointer { String(cString: mkdtemp($0.baseAddress!)!) }
  }

  var file: String { path + "/journal" }

  var bytes: [UInt8] {
    get {
      guard let file = try? FileDescriptor.open(file, flags: O_RDONLY) else { return [] }
      return Self.bytes(of: file.rawValue)
    }
    set {
      // Some file systems sync a file that is overwritten.
      unlink(file)
      let file = try! FileDescriptor.open(file, flags: O_RDWR | O_CREAT | O_TRUNC)
      _ = newValue.withUnsafeBytes { Glibc.write(file.rawValue, $0.baseAddress, $0.count) }
    }
  }

  /// The contents of an open file.
  static func bytes(of file: Int32) -> [UInt8] {
    [UInt8](unsafeUninitializedCapacity: 1 << 20) { buffer, count in
      count = max(0, pread(file, buffer.baseAddress, buffer.count, 0))
    }
  }

  /// Thousands of starts would wait long for the disk.
  static let fastDisk = {
    var disk = MetadataJournal.Disk()
    disk.sync = { _ in 0 }
    disk.syncData = { _ in 0 }
    return disk
  }()

  func write(_ records: [MetadataJournal.Record]) throws { try write(commits: [records]) }

  func write(
    commits: [[MetadataJournal.Record]], disk: MetadataJournal.Disk = fastDisk
  ) throws {
    let journal = try MetadataJournal(directory: path, disk: disk) { _ in nil }
    for records in commits {
      for record in records { journal.append(record) }
      try journal.commit { [] }
    }
  }

  func read() throws -> [MetadataJournal.Record] {
    var found: [MetadataJournal.Record] = []
    _ = try MetadataJournal(directory: path, disk: Self.fastDisk) {
      found.append($0)
      return nil
    }
    return found
  }

  /// Why a start is refused; nil if it is not.
  func refusal() -> String? {
    do {
      _ = try read()
      return nil
    } catch { return "\(error)" }
  }

  var serverOptions: MetadataServer.Options {
    var options = MetadataServer.Options()
    options.directory = path
    return options
  }

  /// A server with its journal here.
  func server(
    onDisk disk: MetadataJournal.Disk, _ change: (inout MetadataLimits) -> Void = { _ in }
  ) throws -> MetadataServer {
    var limits = MetadataLimits()
    change(&limits)
    return try MetadataServer(serverOptions, limits, disk: disk)
  }

  /// A slow disk.
  static func slowDisk(
    syncMilliseconds: UInt32 = 0, syncDataMilliseconds: UInt32 = 0
  ) -> MetadataJournal.Disk {
    var disk = MetadataJournal.Disk()
    disk.sync = { descriptor in
      usleep(syncMilliseconds * 1000)
      return fsync(descriptor)
    }
    disk.syncData = { descriptor in
      usleep(syncDataMilliseconds * 1000)
      return fdatasync(descriptor)
    }
    return disk
  }

  deinit {
    for name in ["journal", "journal.new", "lock"] { unlink("\(path)/\(name)") }
    rmdir(path)
  }
}
