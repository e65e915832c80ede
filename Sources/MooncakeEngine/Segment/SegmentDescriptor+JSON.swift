import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem

extension SegmentDescriptor {
  /// A descriptor with more buffers is refused.
  package static let maximumBufferCount = 1_048_576
  /// A descriptor with more sections is refused.
  package static let maximumSectionCount = 16
  /// So is one with a longer section.
  package static let maximumSectionBytes = 64 << 20

  /// Parses a descriptor as any peer publishes it.
  public init(json: String) throws(MooncakeError) {
    let document: JSONDocument
    do throws(JSONError) {
      document = try JSONDocument(parsing: json)
    } catch {
      throw malformed(error.description)
    }
    self = try document.read { value throws(MooncakeError) in
      try SegmentDescriptor(parsing: value)
    }
  }

  package init(parsing value: JSONValue) throws(MooncakeError) {
    if value.isNull {
      throw MooncakeError(
        .notFound, "the peer serves no segment yet; try again once it has started")
    }
    if !value.isObject { throw malformed("it is not an object") }
    guard let name = value["name"]?.string, !name.isEmpty else { throw malformed("it has no name") }
    let protocols = try parseProtocols(value["protocol"])
    self.init(name: name, protocolName: protocols.contains("tcp") ? "tcp" : protocols[0])
    tcpDataHost = try optionalString(value, "tcp_data_host") ?? ""
    tcpDataPort = UInt16(try optionalInteger(value, "tcp_data_port", upTo: 65_535) ?? 0)
    tcpProtocolVersion = Int(
      try optionalInteger(value, "tcp_proto_version", upTo: UInt64(Int32.max)) ?? 1)
    incarnation = try parseIncarnation(value)
    metadataVersion = try optionalInteger(value, "metadata_version", upTo: .max) ?? 0
    hostIdentity = try optionalString(value, "mooncake_host") ?? ""
    sharedMemoryName = try optionalString(value, "mooncake_shm") ?? ""
    rpcAddress = try optionalString(value, "mooncake_rpc") ?? ""
    sections = try parseSections(value["mooncake_sections"])
    // Other protocols identify their buffers by other means than an address.
    let isStrict = protocols.contains("tcp") || protocols.contains("rdma")
    buffers = try parseBuffers(value["buffers"], isStrict: isStrict)
  }

  /// Sixteen hexadecimal digits.
  package static func text(incarnation: UInt64) -> String {
    let digits = String(incarnation, radix: 16)
    return String(repeating: "0", count: 16 - digits.utf8.count) + digits
  }

  /// The descriptor in the form that peers of every version read. Buffers without remote rights are
  /// left out.
  public func json() -> String {
    let published = buffers.filter { !$0.access.isDisjoint(with: [.remoteRead, .remoteWrite]) }
    var writer = JSONWriter()
    let sectionBytes = sections.values.reduce(0) { $0 + $1.utf8.count }
    writer.reserve(512 + published.count * (96 + name.utf8.count) + sectionBytes)
    writer.beginObject()
    writer.member("name", name)
    writer.member("protocol", protocolName)
    writer.member("tcp_data_host", tcpDataHost)
    writer.member("tcp_data_port", UInt64(tcpDataPort))
    writer.member("tcp_proto_version", UInt64(max(0, tcpProtocolVersion)))
    writer.member("rdma_server_name", "")
    writer.member("timestamp", localTimestamp())
    if metadataVersion != 0 { writer.member("metadata_version", metadataVersion) }
    if incarnation != 0 {
      writer.member("mooncake_incarnation", Self.text(incarnation: incarnation))
    }
    if !sharedMemoryName.isEmpty {
      writer.member("mooncake_host", hostIdentity)
      writer.member("mooncake_shm", sharedMemoryName)
    }
    if !rpcAddress.isEmpty { writer.member("mooncake_rpc", rpcAddress) }
    if !sections.isEmpty {
      writer.name("mooncake_sections")
      writer.beginObject()
      for (name, text) in sections.sorted(by: { $0.key < $1.key }) { writer.member(name, text) }
      writer.endObject()
    }
    writer.name("buffers")
    writer.beginArray()
    for buffer in published {
      writer.beginObject()
      writer.member("name", name)
      writer.member("addr", buffer.address)
      writer.member("length", buffer.length)
      let access = buffer.access.intersection([.remoteRead, .remoteWrite])
      if access != [.remoteRead, .remoteWrite] {
        writer.member("mooncake_access", UInt64(access.rawValue))
      }
      writer.endObject()
    }
    writer.endArray()
    writer.endObject()
    return writer.text
  }
}

extension RemoteBuffer {
  /// Bytes that the buffer adds to a descriptor's text, comma included; 0 without remote rights.
  package func textByteCount(nameByteCount: Int) -> Int {
    let access = access.intersection([.remoteRead, .remoteWrite])
    if access.isEmpty { return 0 }
    let digits = String(address).utf8.count + String(length).utf8.count
    let isWhole = access == [.remoteRead, .remoteWrite]
    return 28 + nameByteCount + digits + (isWhole ? 0 : 20)
  }
}

private func malformed(_ what: String) -> MooncakeError {
  MooncakeError(.protocolViolation, "malformed segment descriptor: \(what)")
}

/// One name, or an array as published by builds with several transports; never empty.
private func parseProtocols(_ value: JSONValue?) throws(MooncakeError) -> [String] {
  guard let value else { throw malformed("it names no protocol") }
  var names: [String] = []
  if let name = value.string {
    names = [name]
  } else if value.isArray {
    for element in value.elements {
      guard let name = element.string else { throw malformed("a protocol is not a string") }
      names.append(name)
    }
  }
  if names.isEmpty || names.contains("") { throw malformed("it names no protocol") }
  return names
}

private func parseIncarnation(_ value: JSONValue) throws(MooncakeError) -> UInt64 {
  guard let text = try optionalString(value, "mooncake_incarnation") else { return 0 }
  guard text.utf8.count == 16, text.utf8.allSatisfy({ Character(UnicodeScalar($0)).isHexDigit }),
    let incarnation = UInt64(text, radix: 16)
  else { throw malformed("mooncake_incarnation is not 16 hexadecimal digits") }
  return incarnation
}

/// The texts themselves are their transports' business: a bad one costs its transport only.
private func parseSections(_ value: JSONValue?) throws(MooncakeError) -> [String: String] {
  guard let value, !value.isNull else { return [:] }
  if !value.isObject { throw malformed("mooncake_sections is not an object") }
  var sections: [String: String] = [:]
  for element in value.elements {
    guard let name = element.name, !name.isEmpty, let text = element.string else {
      throw malformed("a section is not a named string")
    }
    if sections.count == SegmentDescriptor.maximumSectionCount {
      throw malformed("more than \(SegmentDescriptor.maximumSectionCount) sections")
    }
    if text.utf8.count > SegmentDescriptor.maximumSectionBytes {
      throw malformed("a section has more than \(SegmentDescriptor.maximumSectionBytes) bytes")
    }
    if sections.updateValue(text, forKey: name) != nil {
      throw malformed("two sections have the same name")
    }
  }
  return sections
}

private func parseBuffers(
  _ value: JSONValue?, isStrict: Bool
) throws(MooncakeError) -> [RemoteBuffer] {
  guard let value else { return [] }
  if !value.isArray { throw malformed("buffers is not an array") }
  var buffers: [RemoteBuffer] = []
  var index = 0
  for element in value.elements {
    if index == SegmentDescriptor.maximumBufferCount {
      throw malformed("more than \(SegmentDescriptor.maximumBufferCount) buffers")
    }
    do throws(MooncakeError) {
      buffers.append(try parseBuffer(element, index: index))
    } catch {
      if isStrict { throw error }
    }
    index += 1
  }
  let isSorted = zip(buffers, buffers.dropFirst()).allSatisfy { $0.address <= $1.address }
  if !isSorted { buffers.sort { $0.address < $1.address } }
  return buffers
}

private func parseBuffer(_ value: JSONValue, index: Int) throws(MooncakeError) -> RemoteBuffer {
  guard let name = value["name"]?.string, !name.isEmpty else {
    throw malformed("buffer \(index) has no name")
  }
  guard let address = value["addr"]?.unsigned, address != 0 else {
    throw malformed("the address of buffer \(index) is not a positive 64-bit integer")
  }
  guard let length = value["length"]?.unsigned, length != 0 else {
    throw malformed("the length of buffer \(index) is not a positive 64-bit integer")
  }
  if address.addingReportingOverflow(length).overflow {
    throw malformed("buffer \(index) wraps around the address space")
  }
  var access: Access = [.remoteRead, .remoteWrite]
  if let field = value["mooncake_access"] {
    guard let bits = field.unsigned, (1...3).contains(bits) else {
      throw malformed("the access of buffer \(index) is not 1, 2 or 3")
    }
    access = Access(rawValue: UInt32(bits))
  }
  return RemoteBuffer(address: address, length: length, access: access)
}

private func optionalString(
  _ value: JSONValue, _ name: String
) throws(MooncakeError) -> String? {
  guard let field = value[name], !field.isNull else { return nil }
  guard let text = field.string else { throw malformed("\(name) is not a string") }
  return text
}

private func optionalInteger(
  _ value: JSONValue, _ name: String, upTo maximum: UInt64
) throws(MooncakeError) -> UInt64? {
  guard let field = value[name], !field.isNull else { return nil }
  guard let number = field.unsigned, number <= maximum else {
    throw malformed("\(name) is not an integer from 0 to \(maximum)")
  }
  return number
}

/// "2026-08-22 10:00:00.000001" in local time, as peers write it.
private func localTimestamp() -> String {
  var now = timespec()
  clock_gettime(CLOCK_REALTIME, &now)
  var parts = tm()
  // localtime_r takes a lock that would stay locked in a forked child.
  _ = Fork.excluded { localtime_r(&now.tv_sec, &parts) }
  var text = [CChar](repeating: 0, count: 32)
  _ = strftime(&text, text.count, "%F %T", &parts)
  let seconds = text.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
  return "\(seconds).\(String(1_000_000 + now.tv_nsec / 1000).dropFirst())"
}
