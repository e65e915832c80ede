import Glibc

/// A failure in the words of the operating system or of the caller.
public struct ExampleError: Error, CustomStringConvertible {
  public let description: String

  public init(_ description: String) { self.description = description }

  /// Adds the reason why the last system call failed.
  public static func system(_ what: String) -> ExampleError {
    ExampleError("\(what): \(String(cString: strerror(errno)))")
  }
}

/// A model file mapped read-only.
public struct ModelFile: ~Copyable {
  public let address: UnsafeMutableRawPointer
  public let length: Int

  public init(path: String) throws(ExampleError) {
    let file = open(path, O_RDONLY | O_CLOEXEC)
    if file < 0 { throw .system("cannot open \(path)") }
    defer { close(file) }
    var status = stat()
    if fstat(file, &status) != 0 { throw .system("cannot read \(path)") }
    guard status.st_mode & S_IFMT == S_IFREG, status.st_size > 0 else {
      throw ExampleError("\(path) is empty or no file")
    }
    let size = Int(status.st_size)
    guard let pointer = mmap(nil, size, PROT_READ, MAP_PRIVATE, file, 0), pointer != MAP_FAILED
    else { throw .system("cannot map \(path)") }
    address = pointer
    length = size
  }

  deinit { munmap(address, length) }
}

/// Writes bytes to a hidden temporary file next to `path` and renames it once it is complete.
public func writeFile(_ bytes: UnsafeRawBufferPointer, to path: String) throws(ExampleError) {
  let slash = path.lastIndex(of: "/").map { path.index(after: $0) } ?? path.startIndex
  let temporary = "\(path[..<slash]).\(path[slash...]).\(getpid()).tmp"
  let file = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o644)
  if file < 0 { throw .system("cannot write \(temporary)") }
  do throws(ExampleError) {
    defer { close(file) }
    var rest = bytes
    while !rest.isEmpty {
      let count = write(file, rest.baseAddress, min(rest.count, 1 << 30))
      if count < 0 && errno == EINTR { continue }
      if count < 0 { throw .system("cannot write \(temporary)") }
      rest = UnsafeRawBufferPointer(rebasing: rest[count...])
    }
    if fsync(file) != 0 { throw .system("cannot write \(temporary)") }
    if rename(temporary, path) != 0 { throw .system("cannot rename to \(path)") }
  } catch {
    unlink(temporary)
    throw error
  }
}
