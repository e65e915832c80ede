import MooncakeBase
import MooncakeEngine

/// Which NICs are near which memory: maps locations to preferred and available device names.
struct NICMatrix: Sendable, Equatable {
  struct Row: Sendable, Equatable {
    var location: String
    var preferred: [String]
    var available: [String]
  }

  /// In the order of the text it came from.
  private(set) var rows: [Row] = []

  /// Longest text accepted, in bytes.
  static let maximumBytes = 1 << 20

  /// No NIC near anything.
  init() {}

  /// Parses `{"cpu:0": [["mlx5_0"], ["mlx5_1"]]}`.
  init(json text: String) throws(MooncakeError) {
    let document: JSONDocument
    do throws(JSONError) {
      document = try JSONDocument(parsing: text)
    } catch {
      throw Self.malformed(error.description)
    }
    rows = try document.read { value throws(MooncakeError) in
      guard value.isObject else { throw Self.malformed("it is not an object") }
      var rows: [Row] = []
      for member in value.elements { rows.append(try Self.row(member)) }
      return rows
    }
  }

  private static func row(_ member: JSONValue) throws(MooncakeError) -> Row {
    let location = member.name ?? ""
    let lists = member.isArray ? Array(member.elements) : []
    guard lists.count == 2 else {
      throw malformed("\(String(reflecting: location)) is not an array of two arrays")
    }
    return Row(
      location: location, preferred: try names(lists[0], location),
      available: try names(lists[1], location))
  }

  private static func names(_ list: JSONValue, _ location: String) throws(MooncakeError) -> [String]
  {
    guard list.isArray else {
      throw malformed("\(String(reflecting: location)) contains something other than arrays")
    }
    var names: [String] = []
    for element in list.elements {
      guard let name = element.string, !name.isEmpty else {
        throw malformed("a device of \(String(reflecting: location)) is not a name")
      }
      names.append(name)
    }
    return names
  }

  private static func malformed(_ what: String) -> MooncakeError {
    MooncakeError(.invalidArgument, "malformed NIC priority matrix: \(what)")
  }

  /// Writes the matrix as one JSON value.
  func write(to writer: inout JSONWriter) {
    writer.beginObject()
    for row in rows {
      writer.name(row.location)
      writer.beginArray()
      for list in [row.preferred, row.available] {
        writer.beginArray()
        for name in list { writer.value(name) }
        writer.endArray()
      }
      writer.endArray()
    }
    writer.endObject()
  }

  /// One line a location, for people.
  var description: String {
    rows.map { row in
      func list(_ names: [String]) -> String {
        names.isEmpty ? "none" : names.joined(separator: ", ")
      }
      return "  \(row.location): preferred \(list(row.preferred)); "
        + "available \(list(row.available))\n"
    }.joined()
  }
}
