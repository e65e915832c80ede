import CJSON

/// Why a text is not acceptable JSON.
package struct JSONError: Error, Equatable, Sendable, CustomStringConvertible {
  package let description: String
}

/// A parsed JSON text.
///
/// cJSON does the parsing. `JSONText` first checks what cJSON does not: encoding, depth, number of
/// values, and integers too large for a double.
package struct JSONDocument: ~Copyable {
  private let root: UnsafeMutablePointer<cJSON>

  private init(prepared text: [UInt8]) throws(JSONError) {
    let (parsed, end) = text.withUnsafeBytes { buffer in
      let start = buffer.baseAddress!.assumingMemoryBound(to: CChar.self)
      var end: UnsafePointer<CChar>?
      // The NUL after the text is not part of the length: some releases of cJSON read one byte
      // beyond it.
      let parsed = cJSON_ParseWithLengthOpts(start, buffer.count - 1, &end, 0)
      return (parsed, end.map { $0 - start } ?? 0)
    }
    guard let parsed else { throw JSONError(description: "malformed JSON near byte \(end)") }
    guard text[end...].dropLast().allSatisfy({ JSONText.isSpace($0) }) else {
      cJSON_Delete(parsed)
      throw JSONError(description: "text follows the JSON value")
    }
    root = parsed
  }

  /// Parses a text.
  package init(parsing text: String) throws(JSONError) {
    try self.init(parsing: Array(text.utf8))
  }

  /// Parses a text given as bytes.
  package init(parsing bytes: [UInt8]) throws(JSONError) {
    let text = bytes.withUnsafeBytes { buffer in
      Result { () throws(JSONError) in try JSONText.prepared(buffer) }
    }
    try self.init(prepared: text.get())
  }

  deinit { cJSON_Delete(root) }

  /// Runs `body` with the top value, which must not outlive the call.
  package borrowing func read<Result, Failure: Error>(
    _ body: (JSONValue) throws(Failure) -> Result
  ) throws(Failure) -> Result {
    try body(JSONValue(item: root))
  }
}

/// A value inside a `JSONDocument`, valid as long as the document.
package struct JSONValue {
  fileprivate let item: UnsafePointer<cJSON>

  package var isNull: Bool { cJSON_IsNull(item) != 0 }
  package var isObject: Bool { cJSON_IsObject(item) != 0 }
  package var isArray: Bool { cJSON_IsArray(item) != 0 }
  package var isTrue: Bool { cJSON_IsTrue(item) != 0 }

  /// The text of a string; nil for other values.
  package var string: String? {
    guard cJSON_IsString(item) != 0, let text = item.pointee.valuestring else { return nil }
    if UInt8(bitPattern: text.pointee) == JSONText.numberMark { return nil }
    return String(cString: text)
  }

  /// An exact integer from 0 to 2^64 - 1; nil for other values.
  package var unsigned: UInt64? {
    if cJSON_IsNumber(item) != 0 {
      let number = item.pointee.valuedouble
      guard number >= 0, number < 0x1p53, number.rounded() == number else { return nil }
      return UInt64(number)
    }
    guard cJSON_IsString(item) != 0, let text = item.pointee.valuestring,
      UInt8(bitPattern: text.pointee) == JSONText.numberMark
    else { return nil }
    return UInt64(String(cString: text + 1))
  }

  /// The name of a member of an object; nil for other values.
  package var name: String? { item.pointee.string.map { String(cString: $0) } }

  /// The first member of an object with this name; nil if there is none.
  package subscript(name: String) -> JSONValue? {
    guard isObject, let child = cJSON_GetObjectItemCaseSensitive(item, name) else { return nil }
    return JSONValue(item: child)
  }

  /// The values of an array or object in order; none for other values.
  package var elements: JSONElements { JSONElements(child: item.pointee.child) }
}

/// The children of a value.
package struct JSONElements: Sequence, IteratorProtocol {
  fileprivate var child: UnsafeMutablePointer<cJSON>?

  /// No values.
  package static var none: JSONElements { JSONElements(child: nil) }

  package mutating func next() -> JSONValue? {
    guard let current = child else { return nil }
    child = current.pointee.next
    return JSONValue(item: current)
  }
}
