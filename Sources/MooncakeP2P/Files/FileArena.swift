import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Files mapped one after the other in one range of addresses, so that peers see one buffer,
/// however many files there are. The mappings end with the last reference.
final class FileArena: Sendable {
  private let range: MemoryMapping?
  private let places: [Int]
  private let byteCount: UInt64

  /// Reserves addresses for files of these sizes; `what` begins error messages.
  init(sizes: [UInt64], _ what: String) throws(MooncakeError) {
    guard let places = FilePlaces(sizes: sizes, mappingLimit: Self.freeMappings()) else {
      throw MooncakeError(.full, "\(what): the files are larger than any memory")
    }
    self.places = places.offsets
    let end = places.byteCount
    byteCount = UInt64(end)
    if end == 0 {
      range = nil
      return
    }
    try Self.checkMapCount(places.mappingCount, sizes.count { $0 > 0 }, what)
    do throws(Errno) { range = try .reserved(byteCount: end) } catch {
      throw MooncakeError(.outOfMemory, "\(what): reserving addresses for \(end) bytes: \(error)")
    }
  }

  /// Maps a file at its place in the range.
  func map(
    _ index: Int, _ file: borrowing FileDescriptor, _ size: UInt64, _ path: FilePath,
    writable: Bool
  ) throws(MooncakeError) -> UnsafeMutableRawPointer {
    let address = start! + places[index]
    let protection = writable ? PROT_READ | PROT_WRITE : PROT_READ
    let result = mmap(address, Int(size), protection, MAP_SHARED | MAP_FIXED, file.rawValue, 0)
    if result == MAP_FAILED {
      throw FileFailure.error(path, Errno.current, "mapping \(size) bytes of it")
    }
    return address
  }

  /// The place of a file; nil for an empty one.
  func buffer(_ index: Int, _ size: UInt64) -> PayloadBuffer? {
    guard size > 0, let start else { return nil }
    return PayloadBuffer(address: start + places[index], length: size)
  }

  private var start: UnsafeMutableRawPointer? {
    switch range {
    case .some(let range): range.address
    case .none: nil
    }
  }

  /// The whole range.
  var buffer: PayloadBuffer? {
    start.map { PayloadBuffer(address: $0, length: byteCount) }
  }

  /// Leaks the mappings: somebody may still read them.
  func keep() { _ = Unmanaged.passRetained(self) }

  // MARK: The number of mappings

  /// Refuses, before anything is read, more mappings than the system would allow.
  private static func checkMapCount(
    _ count: Int, _ fileCount: Int, _ what: String
  ) throws(MooncakeError) {
    guard let limit = mappingLimit() else { return }
    let needed = mappingCount() + count + spareMappings
    if needed <= limit { return }
    throw MooncakeError(
      .full,
      "\(what): \(fileCount) files that are not empty take a mapping each, and the system allows a "
        + "process \(limit) (vm.max_map_count): raise that with `sysctl -w vm.max_map_count="
        + "\(max(needed, count + count / 4) * 2)`, or pack the files into fewer")
  }

  /// How many more mappings the process may have.
  private static func freeMappings() -> Int {
    mappingLimit().map { $0 - mappingCount() - spareMappings } ?? .max
  }

  private static func mappingLimit() -> Int? { number("/proc/sys/vm/max_map_count") }

  /// Left for the rest of the process.
  private static let spareMappings = 512

  private static func mappingCount() -> Int {
    guard let file = try? FileDescriptor.open("/proc/self/maps", flags: O_RDONLY) else { return 0 }
    var chunk = [UInt8](repeating: 0, count: 64 << 10)
    var count = 0
    while true {
      let length = chunk.withUnsafeMutableBytes { read(file.rawValue, $0.baseAddress, $0.count) }
      if length <= 0 { return count }
      count += chunk[..<length].count { $0 == UInt8(ascii: "\n") }
    }
  }

  private static func number(_ path: String) -> Int? {
    guard let file = try? FileDescriptor.open(path, flags: O_RDONLY) else { return nil }
    var bytes = [UInt8](repeating: 0, count: 32)
    let length = bytes.withUnsafeMutableBytes { read(file.rawValue, $0.baseAddress, $0.count) }
    let digits = bytes.prefix(max(0, length)).prefix { (48...57).contains($0) }
    return Int(String(decoding: digits, as: UTF8.self))
  }
}

/// The places of files laid out one after the other, and the number of mappings that takes.
package struct FilePlaces {
  package private(set) var offsets: [Int] = []
  package private(set) var byteCount = 0
  /// Mappings for the files that are not empty and for the holes between them.
  package private(set) var mappingCount = 0

  private static let hugePageBytes = 2 << 20

  /// Lets large files begin at a huge page, unless the holes that this leaves would be too many
  /// mappings. nil: the files are larger than any memory.
  package init?(sizes: [UInt64], mappingLimit: Int) {
    guard let aligned = Self(sizes, aligns: true) else { return nil }
    if aligned.mappingCount <= mappingLimit {
      self = aligned
    } else {
      self.init(sizes, aligns: false)
    }
  }

  private init?(_ sizes: [UInt64], aligns: Bool) {
    for size in sizes {
      guard let length = Int(exactly: size), length < Int.max / 4, byteCount < Int.max / 4 else {
        return nil
      }
      if aligns && length >= Self.hugePageBytes {
        let aligned = Self.roundedUp(byteCount, Self.hugePageBytes)
        if aligned > byteCount { mappingCount += 1 }
        byteCount = aligned
      }
      offsets.append(byteCount)
      byteCount += Self.roundedUp(length, MemoryMapping.pageBytes)
      if length > 0 { mappingCount += 1 }
    }
  }

  private static func roundedUp(_ number: Int, _ unit: Int) -> Int {
    (number + unit - 1) & ~(unit - 1)
  }
}
