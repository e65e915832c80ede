// Reads and writes C texts: bounded, valid UTF-8, never beyond the caller's buffer.
import Glibc
import MooncakeBase
import MooncakeEngine

/// Longest name, address, URI or location accepted, in bytes.
let maximumNameBytes = 4096

/// Longest notification text accepted, in bytes; name and JSON around it must fit the RPC message,
/// too. A peer may accept less.
var maximumMessageBytes: Int { Notification.byteLimit }

/// Copies a required, non-empty text.
func requiredText(
  _ text: UnsafePointer<CChar>?, _ argument: StaticString, maximum: Int = maximumNameBytes
) throws(MooncakeError) -> String {
  guard let value = try optionalText(text, argument, maximum: maximum) else {
    throw MooncakeError(.invalidArgument, "\(argument) is null")
  }
  return value
}

/// Copies a text that may be null but not empty.
func optionalText(
  _ text: UnsafePointer<CChar>?, _ argument: StaticString, maximum: Int = maximumNameBytes
) throws(MooncakeError) -> String? {
  guard let text else { return nil }
  let value = try copiedText(text, argument, maximum: maximum)
  if value.isEmpty { throw MooncakeError(.invalidArgument, "\(argument) is empty") }
  return value
}

/// Copies a required text that may be empty.
func messageText(
  _ text: UnsafePointer<CChar>?, _ argument: StaticString, maximum: Int = maximumMessageBytes
) throws(MooncakeError) -> String {
  guard let text else { throw MooncakeError(.invalidArgument, "\(argument) is null") }
  return try copiedText(text, argument, maximum: maximum)
}

private func copiedText(
  _ text: UnsafePointer<CChar>, _ argument: StaticString, maximum: Int
) throws(MooncakeError) -> String {
  let count = strnlen(text, maximum + 1)
  if count > maximum {
    throw MooncakeError(.invalidArgument, "\(argument) is longer than \(maximum) bytes")
  }
  let bytes = UnsafeRawBufferPointer(start: text, count: count)
  guard let value = String(validating: bytes, as: UTF8.self) else {
    throw MooncakeError(.invalidArgument, "\(argument) is not valid UTF-8")
  }
  return value
}

/// Writes a text by the rule of mooncake.h: truncates it to fit, returns the full length;
/// truncation is an error.
func writeText(
  _ text: String, _ buffer: UnsafeMutablePointer<CChar>?, _ capacity: UInt64,
  _ length: UnsafeMutablePointer<UInt64>?
) throws(MooncakeError) {
  if buffer == nil && capacity > 0 {
    throw MooncakeError(.invalidArgument, "buffer is null but capacity is \(capacity)")
  }
  let count = writePrefix(of: text, buffer, Int(clamping: capacity))
  length?.pointee = UInt64(count)
  if UInt64(count) >= capacity {
    throw MooncakeError(.full, "the text needs \(count + 1) bytes with its NUL, not \(capacity)")
  }
}

/// Writes as much as fits and a NUL; returns the length of the whole text.
@discardableResult
func writePrefix(
  of text: String, _ buffer: UnsafeMutablePointer<CChar>?, _ capacity: Int
) -> Int {
  var text = text
  return text.withUTF8 { bytes in
    if let buffer, capacity > 0 {
      let count = min(bytes.count, capacity - 1)
      if count > 0, let base = bytes.baseAddress { memcpy(buffer, base, count) }
      buffer[count] = 0
    }
    return bytes.count
  }
}
