// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Structs of mooncake.h that begin with their own size and grow only at the end: callers may use
// any version since the first.
import CMooncake
import Glibc
import MooncakeBase
import MooncakeEngine

/// A larger struct_size is taken for a mistake, not for a later version.
private let maximumSize = 4096

/// A struct whose first field is `uint32_t struct_size`. All zeros are the defaults.
protocol SizedStruct {
  init()
  var struct_size: UInt32 { get set }
  /// Its name in C.
  static var typeName: StaticString { get }
  /// Its size in the first version that had it.
  static var firstSize: Int { get }
}

extension SizedStruct {
  private static var currentSize: Int { MemoryLayout<Self>.size }

  /// Converts a caller's struct to the current version; null gives the defaults.
  static func read(_ given: UnsafePointer<Self>?) throws(MooncakeError) -> Self {
    var values = Self()
    guard let given else { return values }
    let bytes = UnsafeRawPointer(given)
    // Read only struct_size first: the memory may end right after the caller's version.
    let size = try checkSize(bytes.loadUnaligned(as: UInt32.self))
    if size > currentSize {
      let extra = UnsafeRawBufferPointer(start: bytes + currentSize, count: size - currentSize)
      if extra.contains(where: { $0 != 0 }) {
        throw MooncakeError(
          .unsupported,
          "\(typeName) uses fields beyond the \(currentSize) bytes that this version of the "
            + "library knows: load a newer library or leave them 0")
      }
    }
    withUnsafeMutableBytes(of: &values) {
      $0.copyMemory(from: UnsafeRawBufferPointer(start: bytes, count: min(size, currentSize)))
    }
    return values
  }

  /// Writes this value, the defaults, into a struct of the caller's size.
  func write(
    to output: UnsafeMutablePointer<Self>?, _ argument: StaticString, size: UInt32
  ) throws(MooncakeError) {
    let output = try checkOutput(output, argument)
    let size = try Self.checkSize(size)
    var values = self
    values.struct_size = UInt32(size)
    memset(output, 0, size)
    _ = withUnsafeBytes(of: values) { memcpy(output, $0.baseAddress!, min(size, $0.count)) }
  }

  private static func checkSize(_ size: UInt32) throws(MooncakeError) -> Int {
    guard size >= firstSize, size <= maximumSize else {
      throw MooncakeError(
        .invalidArgument,
        "struct_size is \(size): set it to sizeof(\(typeName)), which is \(currentSize) in this "
          + "version")
    }
    return Int(size)
  }
}

/// Checks that a reserved field is 0.
func checkReserved(_ value: UInt32, _ argument: StaticString) throws(MooncakeError) {
  if value != 0 { throw MooncakeError(.invalidArgument, "\(argument) is not 0") }
}

/// Checks a field that must be 0 or 1.
func checkFlag(_ value: UInt32, _ argument: StaticString) throws(MooncakeError) -> Bool {
  if value > 1 { throw MooncakeError(.invalidArgument, "\(argument) is \(value), not 0 or 1") }
  return value == 1
}
