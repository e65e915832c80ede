// The options of mooncake_engine_create().
import CMooncake
import MooncakeBase
import MooncakeEngine

extension mooncake_engine_options_t: SizedStruct {
  static var typeName: StaticString { "mooncake_engine_options_t" }
  static var firstSize: Int { 72 }
}

/// Writes the defaults into a struct of the caller's size.
func writeDefaultOptions(
  _ options: UnsafeMutablePointer<mooncake_engine_options_t>?, size: UInt32
) throws(MooncakeError) {
  let defaults = TransferEngine.Options()
  var values = mooncake_engine_options_t()
  values.default_timeout_ms = defaults.defaultTimeoutMilliseconds
  values.io_threads = UInt32(defaults.ioThreads)
  values.connections_per_peer = UInt32(defaults.connectionsPerPeer)
  values.spin_us = UInt32(defaults.spinMicroseconds)
  try values.write(to: options, "options", size: size)
}

/// Reads and checks a caller's options.
func readOptions(
  _ given: UnsafePointer<mooncake_engine_options_t>?
) throws(MooncakeError) -> TransferEngine.Options {
  var options = TransferEngine.Options()
  let values = try mooncake_engine_options_t.read(given)
  try checkReserved(values.reserved, "options.reserved")
  guard let port = UInt16(exactly: values.port) else {
    throw MooncakeError(.invalidArgument, "options.port \(values.port) is above 65535")
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

private func parseTransports(_ list: String) throws(MooncakeError) -> [String] {
  var names: [String] = []
  for part in list.split(separator: ",", omittingEmptySubsequences: false) {
    let name = String(part.drop { $0 == " " }.reversed().drop { $0 == " " }.reversed())
    if name.isEmpty {
      throw MooncakeError(.invalidArgument, "options.transports has an empty entry")
    }
    if !names.contains(name) { names.append(name) }
  }
  return names
}

private func replace<Number: FixedWidthInteger>(
  _ option: inout Number, _ value: UInt32, _ range: ClosedRange<UInt32>, _ argument: StaticString
) throws(MooncakeError) {
  if value == 0 { return }
  if !range.contains(value) {
    throw MooncakeError(
      .invalidArgument,
      "\(argument) is \(value), not from \(range.lowerBound) to \(range.upperBound)")
  }
  option = Number(value)
}
