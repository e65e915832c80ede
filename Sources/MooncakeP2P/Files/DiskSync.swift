import Glibc
import MooncakeSystem

/// Writes to disk what a descriptor refers to.
package struct DiskSync: Sendable {
  private let body: @Sendable (Int32) -> Int32

  /// Returns 0, or -1 with `errno`, as the system's call does.
  package init(_ body: @escaping @Sendable (Int32) -> Int32) { self.body = body }

  package static let system = DiskSync { fsync($0) }

  func callAsFunction(_ number: Int32) throws(Errno) {
    _ = try retryingInterrupts { body(number) }
  }

  /// For a directory: the names in it.
  func callAsFunction(_ directory: Directory) throws(Errno) {
    // It may be open only for path lookups (O_PATH).
    let copy = try directory.file(".", flags: O_RDONLY | O_DIRECTORY)
    try self(copy.rawValue)
  }
}
