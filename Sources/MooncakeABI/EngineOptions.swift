// The sized options struct of mooncake_engine_create(): every version of it, from the first on.
import CMooncake
import Glibc
import MooncakeEngine

private let currentSize = MemoryLayout<mooncake_engine_options_t>.size
/// Size of the struct in 0.1.
private let firstSize = 72
/// A larger struct_size is a mistake rather than a later version.
private let maximumSize = 4096

/// Writes the defaults into a struct of the caller's size.
func writeDefaultOptions(
  _ options: UnsafeMutablePointer<mooncake_engine_options_t>, size: UInt32
) throws(EngineError) {
  let size = try checkSize(size)
  let defaults = TransferEngine.Options()
  var values = mooncake_engine_options_t()
  values.struct_size = UInt32(size)
  values.default_timeout_ms = defaults.defaultTimeoutMilliseconds
  values.io_threads = UInt32(defaults.ioThreads)
  values.connections_per_peer = UInt32(defaults.connectionsPerPeer)
  values.spin_us = UInt32(defaults.spinMicroseconds)
  memset(options, 0, size)
  memcpy(options, &values, min(size, currentSize))
}

/// Reads what a caller asks for.
func readOptions(
  _ given: UnsafePointer<mooncake_engine_options_t>?
) throws(EngineError) -> TransferEngine.Options {
  var options = TransferEngine.Options()
  guard let given else { return options }
  let values = try copyOptions(given)
  if values.reserved != 0 { throw EngineError(.invalidArgument, "options.reserved is not 0") }
  guard let port = UInt16(exactly: values.port) else {
    throw EngineError(.invalidArgument, "options.port \(values.port) is beyond 65535")
  }
  options.port = port
  options.name = try optionalText(values.name, "options.name")
  options.bindAddress = try optionalText(values.bind_address, "options.bind_address")
  options.advertisedAddress = try optionalText(
    values.advertised_address, "options.advertised_address")
  if let uri = try optionalText(values.metadata_uri, "options.metadata_uri") {
    options.metadataURI = uri
  }
  if let list = try optionalText(values.transports, "options.transports") {
    options.transports = try parseTransports(list)
  }
  if values.default_timeout_ms != 0 {
    options.defaultTimeoutMilliseconds = values.default_timeout_ms
  }
  try replace(&options.ioThreads, values.io_threads, 1...64, "options.io_threads")
  try replace(
    &options.connectionsPerPeer, values.connections_per_peer, 1...64,
    "options.connections_per_peer")
  try replace(&options.spinMicroseconds, values.spin_us, 1...1_000_000, "options.spin_us")
  options.processors = try optionalText(values.processors, "options.processors")
  return options
}

private func checkSize(_ size: UInt32) throws(EngineError) -> Int {
  guard size >= firstSize, size <= maximumSize else {
    throw EngineError(
      .invalidArgument,
      "struct_size is \(size): set it to sizeof(mooncake_engine_options_t), which is "
        + "\(currentSize) in this version")
  }
  return Int(size)
}

/// Brings a struct of any version to the current one.
private func copyOptions(
  _ given: UnsafePointer<mooncake_engine_options_t>
) throws(EngineError) -> mooncake_engine_options_t {
  let bytes = UnsafeRawPointer(given)
  // The rest may not exist before its size is known.
  let size = try checkSize(bytes.loadUnaligned(as: UInt32.self))
  if size > currentSize {
    let extra = UnsafeRawBufferPointer(start: bytes + currentSize, count: size - currentSize)
    if extra.contains(where: { $0 != 0 }) {
      throw EngineError(
        .unsupported,
        "options use fields beyond the \(currentSize) bytes that this version of the library "
          + "knows: load a newer library or leave them 0")
    }
  }
  var values = mooncake_engine_options_t()
  memcpy(&values, bytes, min(size, currentSize))
  return values
}

private func parseTransports(_ list: String) throws(EngineError) -> [String] {
  var names: [String] = []
  for part in list.split(separator: ",", omittingEmptySubsequences: false) {
    let name = String(part.drop { $0 == " " }.reversed().drop { $0 == " " }.reversed())
    if name.isEmpty {
      throw EngineError(.invalidArgument, "options.transports has an empty entry")
    }
    if !names.contains(name) { names.append(name) }
  }
  return names
}

private func replace<Number: FixedWidthInteger>(
  _ option: inout Number, _ value: UInt32, _ range: ClosedRange<UInt32>, _ argument: StaticString
) throws(EngineError) {
  if value == 0 { return }
  if !range.contains(value) {
    throw EngineError(
      .invalidArgument,
      "\(argument) is \(value), not from \(range.lowerBound) to \(range.upperBound)")
  }
  option = Number(value)
}
