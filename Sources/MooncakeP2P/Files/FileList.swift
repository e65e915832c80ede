import MooncakeBase
import MooncakeEngine

/// The files that a payload consists of, as carried in its manifest. Those that are not empty are
/// its buffers, in the same order.
package struct FileList: Equatable, Sendable {
  package struct File: Equatable, Sendable {
    /// Below the directory that was published, parts separated by "/".
    package var path: String
    package var size: UInt64
    package var isExecutable: Bool

    package init(path: String, size: UInt64, isExecutable: Bool = false) {
      self.path = path
      self.size = size
      self.isExecutable = isExecutable
    }
  }

  package static let maximumFileCount = 65_536
  private static let maximumPathBytes = 4096
  private static let maximumPartBytes = 255
  private static let maximumPartCount = 64

  package let files: [File]

  /// Checks a list of local files.
  package init(_ files: [File]) throws(MooncakeError) {
    if let problem = Self.problem(with: files) {
      throw MooncakeError(.invalidArgument, "these files cannot be a payload: \(problem)")
    }
    self.files = files
  }

  /// Reads the list from a peer's manifest, which may contain anything.
  package init(parsing manifest: Manifest) throws(MooncakeError) {
    let document: JSONDocument
    do throws(JSONError) { document = try JSONDocument(parsing: manifest.attributes) } catch {
      throw Self.violation(error.description)
    }
    let files = try document.read(Self.files)
    if let problem = Self.problem(with: files) { throw Self.violation(problem) }
    let sizes = files.map(\.size).filter { $0 > 0 }
    if sizes != manifest.layout.bufferSizes {
      throw Self.violation("the sizes of the files are not those of the payload's buffers")
    }
    self.files = files
  }

  /// The list as the attributes of a manifest. It states no version while that is 1, because a
  /// different text would be a different version of the payload.
  package var json: [UInt8] {
    var writer = JSONWriter()
    writer.beginObject()
    writer.name("files")
    writer.beginArray()
    for file in files {
      writer.beginObject()
      writer.member("path", file.path)
      writer.member("size", file.size)
      if file.isExecutable {
        writer.name("executable")
        writer.value(true)
      }
      writer.endObject()
    }
    writer.endArray()
    writer.endObject()
    return Array(writer.text.utf8)
  }

  private static func files(_ value: JSONValue) throws(MooncakeError) -> [File] {
    try StoreVersion.check(value, "the payload's list of files")
    guard let list = value["files"], list.isArray else {
      throw violation("it has no array 'files'")
    }
    var files: [File] = []
    for item in list.elements {
      guard let path = item["path"]?.string, let size = item["size"]?.unsigned else {
        throw violation("file \(files.count) has no path or no size")
      }
      if files.count == maximumFileCount {
        throw violation("more than \(maximumFileCount) files")
      }
      files.append(File(path: path, size: size, isExecutable: item["executable"]?.isTrue == true))
    }
    return files
  }

  private static func violation(_ what: String) -> MooncakeError {
    MooncakeError(.protocolViolation, "the payload's list of files is refused: \(what)")
  }

  private static func problem(with files: [File]) -> String? {
    if files.isEmpty { return "the list is empty" }
    if files.count > maximumFileCount {
      return "\(files.count) files, more than \(maximumFileCount)"
    }
    for file in files {
      if let problem = problem(with: file.path) { return problem }
    }
    return conflict(among: files)
  }

  private static func conflict(among files: [File]) -> String? {
    // Compared by bytes: two spellings of one letter are equal strings but different files. With
    // "/" as the smallest byte, a directory comes right before its contents.
    let keys = files.map { file in file.path.utf8.map { $0 == UInt8(ascii: "/") ? 0 : $0 } }
      .sorted { $0.lexicographicallyPrecedes($1) }
    var directoryCount = 0
    var former: [UInt8] = []
    for key in keys {
      let common = zip(former, key).prefix { $0 == $1 }.count
      if common == former.count && !former.isEmpty {
        if common == key.count { return "'\(path(key))' is listed twice" }
        if key[common] == 0 { return "'\(path(former))' is a file and a directory" }
      }
      directoryCount += key[common...].count { $0 == 0 }
      if directoryCount > maximumFileCount {
        return "the files are in more than \(maximumFileCount) directories"
      }
      former = key
    }
    return nil
  }

  private static func path(_ key: [UInt8]) -> String {
    String(decoding: key.map { $0 == 0 ? UInt8(ascii: "/") : $0 }, as: UTF8.self)
  }

  /// Why a path is refused: it would leave the directory or mislead a reader.
  private static func problem(with path: String) -> String? {
    // Never repeats a long hostile path, or one that could control a terminal.
    let shown = String(
      decoding: path.utf8.prefix(100).map { isControl($0) ? UInt8(ascii: "?") : $0 },
      as: UTF8.self)
    let bytes = path.utf8.count
    if bytes > maximumPathBytes { return "the path '\(shown)...' has \(bytes) bytes" }
    if path.utf8.contains(where: isControl) {
      return "the path '\(shown)' has control characters"
    }
    let parts = path.utf8.split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: false)
    if parts.count > maximumPartCount { return "the path '\(shown)' is too deep" }
    for part in parts {
      if part.isEmpty { return "the path '\(shown)' has an empty part" }
      if part.elementsEqual(".".utf8) || part.elementsEqual("..".utf8) {
        return "the path '\(shown)' has a part '.' or '..'"
      }
      if StagingArea.isStaging(Substring(part)) {
        return "a name in '\(shown)' begins with \(StagingArea.prefix), which is reserved for gets"
      }
      if part.count > maximumPartBytes { return "a name in '\(shown)' is too long" }
    }
    return nil
  }

  private static func isControl(_ byte: UInt8) -> Bool { byte < 0x20 || byte == 0x7F }
}
