import MooncakeBase
import MooncakeEngine

/// What an engine tells its peers: where its hardware's table is, and each buffer's remote key for
/// each device.
package struct CQSection: Equatable, Sendable {
  package var process: Int32
  package var file: Int32
  package var identity: UInt64
  package var deviceCount: Int
  /// Of the first buffer for each device, then of the second one.
  package var keys: [UInt32]

  package static let deviceLimit = 8
  static let digitsPerKey = 8

  package init(process: Int32, file: Int32, identity: UInt64, deviceCount: Int, keys: [UInt32]) {
    self.process = process
    self.file = file
    self.identity = identity
    self.deviceCount = deviceCount
    self.keys = keys
  }

  package var text: String {
    var digits: [UInt8] = []
    digits.reserveCapacity(keys.count * Self.digitsPerKey)
    for key in keys {
      for shift in stride(from: 28, through: 0, by: -4) {
        let digit = UInt8(key >> UInt32(shift) & 15)
        digits.append(digit < 10 ? 48 + digit : 87 + digit)
      }
    }
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("process", UInt64(process))
    writer.member("file", UInt64(file))
    writer.member("identity", identity)
    writer.member("devices", UInt64(deviceCount))
    writer.member("keys", String(decoding: digits, as: UTF8.self))
    writer.endObject()
    return writer.text
  }

  /// Reads the section of a descriptor that lists `bufferCount` buffers.
  package init(parsing text: String, bufferCount: Int) throws(MooncakeError) {
    let document: JSONDocument
    do throws(JSONError) { document = try JSONDocument(parsing: text) } catch {
      throw Self.malformed(error.description)
    }
    self = try document.read { value throws(MooncakeError) in
      try Self(value, bufferCount)
    }
  }

  private init(_ value: JSONValue, _ bufferCount: Int) throws(MooncakeError) {
    guard value.isObject else { throw Self.malformed("it is not an object") }
    func number(_ name: String, upTo limit: UInt64) throws(MooncakeError) -> UInt64 {
      guard let number = value[name]?.unsigned, number <= limit else {
        throw Self.malformed("\(name) is not an integer from 0 to \(limit)")
      }
      return number
    }
    process = Int32(try number("process", upTo: UInt64(Int32.max)))
    file = Int32(try number("file", upTo: UInt64(Int32.max)))
    identity = try number("identity", upTo: .max)
    deviceCount = Int(try number("devices", upTo: UInt64(Self.deviceLimit)))
    if deviceCount == 0 { throw Self.malformed("it has no devices") }
    guard let digits = value["keys"]?.string?.utf8,
      digits.count == bufferCount * deviceCount * Self.digitsPerKey
    else {
      throw Self.malformed("keys is not one key for each of \(bufferCount) buffers and device")
    }
    keys = []
    keys.reserveCapacity(bufferCount * deviceCount)
    var key: UInt32 = 0
    var count = 0
    for digit in digits {
      switch digit {
      case 48...57: key = key << 4 | UInt32(digit - 48)
      case 97...102: key = key << 4 | UInt32(digit - 87)
      default: throw Self.malformed("a key is not hexadecimal")
      }
      count += 1
      if count % Self.digitsPerKey == 0 {
        keys.append(key)
        key = 0
      }
    }
  }

  private static func malformed(_ what: String) -> MooncakeError {
    MooncakeError(.protocolViolation, "malformed section of completion queues: \(what)")
  }
}

/// A peer's keys, found by the number of the buffer that the router has noted in the slice.
final class RemoteKeys: Sendable {
  private let table: RangeTable
  private let section: CQSection

  init(_ table: RangeTable, _ section: CQSection) {
    self.table = table
    self.section = section
  }

  /// 0 if there is none. The number may be that of another version of the descriptor, so the buffer
  /// must contain the range; if it does, its key is right.
  func find(_ slice: SlicePointer, device: Int) -> UInt32 {
    let length = UInt64(slice.pointee.length)
    var index = Int(slice.pointee.remoteBuffer)
    if !contains(index, slice.pointee.remote, length) {
      index = table.find(slice.pointee.remote, length)
      if index < 0 { return 0 }
    }
    return section.keys[index * section.deviceCount + device]
  }

  private func contains(_ index: Int, _ address: UInt64, _ length: UInt64) -> Bool {
    guard table.buffers.indices.contains(index) else { return false }
    let buffer = table.buffers[index]
    let offset = address &- buffer.address
    return offset < buffer.length && length <= buffer.length - offset
  }
}
