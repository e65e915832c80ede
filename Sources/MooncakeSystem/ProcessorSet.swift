import CLinux
import Glibc

/// Processors that threads may be bound to.
package struct ProcessorSet: Sendable {
  // The bits of cpu_set_t, which has no other accessors here.
  private var bits = cpu_set_t()

  /// Why a text is not a list of usable processors.
  package struct ParseError: Error, CustomStringConvertible {
    package let description: String
  }

  private static let limit = MemoryLayout<cpu_set_t>.size * 8

  /// Reads a list in the kernel's format, such as "0-3,8", or "node:1" for the processors of a NUMA
  /// node. The process must be allowed to use all of them.
  package init(parsing text: String) throws(ParseError) {
    var list = text
    if text.hasPrefix("node:") {
      let node = text.dropFirst(5)
      guard let number = UInt32(node),
        let found = Self.readLine("/sys/devices/system/node/node\(number)/cpulist"), !found.isEmpty
      else { throw ParseError(description: "this machine has no processors in NUMA node \(node)") }
      list = found
    }
    for part in list.split(separator: ",", omittingEmptySubsequences: false) {
      let ends = part.split(separator: "-", omittingEmptySubsequences: false)
      guard ends.count <= 2, let first = Int(ends[0]), let last = Int(ends[ends.count - 1]),
        first >= 0, first <= last, last < Self.limit
      else {
        throw ParseError(
          description: "'\(text)' is neither a list of processors, such as 0-3,8, nor node:N")
      }
      for number in first...last { insert(number) }
    }
    let open = Self.open
    for number in 0..<Self.limit where contains(number) && !open.contains(number) {
      throw ParseError(description: "this process may not run on processor \(number)")
    }
  }

  private init() {}

  /// The processors that the process may use.
  private static var open: ProcessorSet {
    var set = ProcessorSet()
    // If this fails, the kernel refuses forbidden processors when a thread is bound.
    if sched_getaffinity(getpid(), MemoryLayout<cpu_set_t>.size, &set.bits) != 0 {
      for number in 0..<limit { set.insert(number) }
    }
    return set
  }

  package var count: Int {
    withUnsafeBytes(of: bits) { $0.reduce(0) { $0 + $1.nonzeroBitCount } }
  }

  package func contains(_ number: Int) -> Bool {
    withUnsafeBytes(of: bits) { $0[number / 8] & 1 << (number % 8) != 0 }
  }

  private mutating func insert(_ number: Int) {
    withUnsafeMutableBytes(of: &bits) { $0[number / 8] |= 1 << (number % 8) }
  }

  /// Binds the calling thread.
  package func bindCurrentThread() throws(Errno) {
    var bits = self.bits
    let result = pthread_setaffinity_np(
      pthread_self(), MemoryLayout<cpu_set_t>.size, &bits)
    if result != 0 { throw Errno(result) }
  }

  private static func readLine(_ path: String) -> String? {
    guard let file = try? FileDescriptor.open(path, flags: O_RDONLY) else { return nil }
    var bytes = [UInt8](repeating: 0, count: 4096)
    let length = read(file.rawValue, &bytes, bytes.count)
    if length < 0 { return nil }
    return String(decoding: bytes.prefix(length).prefix { $0 != UInt8(ascii: "\n") }, as: UTF8.self)
  }
}
