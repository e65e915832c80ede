import MooncakeBase
import MooncakeEngine

/// The version of the messages and published records of the store.
///
/// A message, a record or a list of files carries the lowest version that its reader must know;
/// without one, that is 1. A member that a reader may ignore is added without a new version,
/// because unknown members are ignored. One that it must understand raises the version.
package enum StoreVersion {
  package static let current: UInt64 = 1
  static let member = "store_version"
  /// The member of a refusal that gives the reason as a keyword; its text is for people.
  static let reasonMember = "reason"
  private static let reason = "version"

  /// Throws `unsupported`, naming both versions, if `value` needs a later version than this process
  /// knows.
  static func check(_ value: JSONValue, _ what: String) throws(MooncakeError) {
    guard let number = value[member] else { return }
    guard let needed = number.unsigned else {
      throw MooncakeError(.protocolViolation, "\(what): malformed \(member)")
    }
    if needed > current {
      throw MooncakeError(
        .unsupported,
        "\(what)\(author(of: value)) needs version \(needed) of the store, this process knows "
          + "\(current): update libmooncake here")
    }
  }

  /// Who wrote a record, if it says so in the form of this version.
  private static func author(of record: JSONValue) -> String {
    let written = [record["holder"], record["origin"]].lazy.compactMap { $0 }
      .compactMap { try? HolderAddress(parsing: $0) }.first
    guard let written else { return "" }
    return printable(" (written by \(written.segment) at \(written.rpc))")
  }

  /// A holder's answer to a question that needs a later version; nil if it does not.
  static func refusal(of question: JSONValue) -> String? {
    guard let number = question[member] else { return nil }
    guard let needed = number.unsigned else {
      return refusal("the question has a malformed \(member)")
    }
    if needed <= current { return nil }
    return refusal(
      "the question needs version \(needed) of the store, this holder knows \(current): update "
        + "libmooncake there", reason: reason)
  }

  /// The answer of a holder that refuses a request.
  static func refusal(_ text: String, reason: String? = nil) -> String {
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("error", text)
    if let reason { writer.member(reasonMember, reason) }
    writer.storeVersion()
    writer.endObject()
    return writer.text
  }

  /// Throws if an answer is a refusal. Its text comes from another process.
  static func checkAnswer(_ value: JSONValue) throws(MooncakeError) {
    try check(value, "its answer")
    guard let text = value["error"]?.string else { return }
    throw MooncakeError(
      value[reasonMember]?.string == reason ? .unsupported : .protocolViolation,
      "it refuses: \(Self.printable(text))")
  }

  private static func printable(_ text: String) -> String {
    String(
      decoding: text.utf8.prefix(300).map { $0 < 0x20 || $0 == 0x7F ? UInt8(ascii: "?") : $0 },
      as: UTF8.self)
  }
}

extension JSONWriter {
  /// Writes which version a reader must know.
  mutating func storeVersion() { member(StoreVersion.member, StoreVersion.current) }
}
