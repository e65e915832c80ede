import MooncakeBase
import MooncakeEngine

/// The rules for payload names, which are parts of keys in the metadata service.
package enum PayloadName {
  package static let maximumBytes = 512

  /// Refuses names that cannot be keys.
  package static func check(_ name: String) throws(MooncakeError) {
    guard let reason = fault(name) else { return }
    throw MooncakeError(
      .invalidArgument,
      "payload name \(String(reflecting: String(name.prefix(100)))) \(reason): a name has 1 to "
        + "\(maximumBytes) bytes without control characters and does not begin with a slash")
  }

  /// Why a name is refused; nil if it is acceptable.
  static func fault(_ name: String) -> String? {
    if name.isEmpty { return "is empty" }
    if name.utf8.count > maximumBytes { return "is longer than \(maximumBytes) bytes" }
    if name.utf8.first == UInt8(ascii: "/") { return "begins with a slash" }
    if name.utf8.contains(where: { $0 < 0x20 || $0 == 0x7F }) {
      return "has a control character"
    }
    return nil
  }
}
