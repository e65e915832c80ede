// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Section "Engine" of transfer_engine_c.h: life cycle and transports.
import CMooncake
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Creates an engine; when this returns, it listens and serves peers.
@c @implementation
package func createTransferEngine(
  _ metadata_conn_string: UnsafePointer<CChar>?, _ local_server_name: UnsafePointer<CChar>?,
  _ ip_or_host_name: UnsafePointer<CChar>?, _ rpc_port: UInt64, _ auto_discover: Int32
) -> transfer_engine_t? {
  do throws(MooncakeError) {
    try refuseInsideLogCallback()
    let uri = try requiredText(metadata_conn_string, "metadata_conn_string")
    var listen = DropInListenOptions(
      serverName: try messageText(
        local_server_name, "local_server_name", maximum: maximumNameBytes))
    // Mooncake ignores this argument, so nothing in it may make the call fail.
    listen.hostName = try? optionalText(ip_or_host_name, "ip_or_host_name")
    listen.port = rpc_port

    var options = TransferEngine.Options()
    options.metadataURI = uri
    options.listenRules = .dropIn(listen)
    if let timeout = timeoutFromEnvironment() { options.defaultTimeoutMilliseconds = timeout }
    let handle = try EngineTable.shared.insert(.dropIn) { () throws(MooncakeError) in
      try TransferEngine(options)
    }
    if auto_discover != 0 || getenv("MC_FORCE_TCP") != nil {
      try? EngineTable.shared.with(handle, .dropIn) { record throws(MooncakeError) in
        record.dropIn.isTransportInstalled.store(true, ordering: .relaxed)
      }
    }
    return transfer_engine_t(bitPattern: UInt(handle))
  } catch {
    // Programs written for Mooncake look only at the log.
    if !ThreadState.isInsideLogCallback { Log.error("createTransferEngine: \(error.message)") }
    ThreadState.setMessage("createTransferEngine", error.message)
    return nil
  }
}

/// Ends an engine.
@c @implementation
package func destroyTransferEngine(_ engine: transfer_engine_t?) {
  guard let engine else { return }
  do throws(MooncakeError) {
    try EngineTable.shared.destroy(number(of: engine), .dropIn)
  } catch {
    report(#function, error.message)
  }
}

/// The "host:port" of the engine's RPC side.
@c @implementation
package func getLocalIpAndPort(
  _ engine: transfer_engine_t?, _ buf_out: UnsafeMutablePointer<CChar>?, _ buf_len: Int
) -> Int32 {
  dropInCall(engine) { record throws(MooncakeError) in
    try writeCut(record.engine.name, buf_out, buf_len)
    return 0
  }
}

/// Installs a transport.
@c @implementation
package func installTransport(
  _ engine: transfer_engine_t?, _ proto: UnsafePointer<CChar>?,
  _ args: UnsafeMutablePointer<UnsafeMutableRawPointer?>?
) -> transport_t? {
  dropInValue(engine) { record throws(MooncakeError) in
    let name = try requiredText(proto, "proto")
    let matrix = try readMatrix(args)
    guard TransportRegistry.names.contains(name) else { throw unavailable(name) }
    try record.engine.attach(name)
    if let matrix { record.dropIn.matrix.withLock { $0 = matrix } }
    record.dropIn.isTransportInstalled.store(true, ordering: .relaxed)
    let mark = number(of: engine) & ~0b111 | HandleKind.transport.rawValue << 1 | 1
    return transport_t(bitPattern: UInt(mark))
  }
}

/// Does nothing: transports stay until the engine ends.
@c @implementation
package func uninstallTransport(
  _ engine: transfer_engine_t?, _ proto: UnsafePointer<CChar>?
) -> Int32 {
  dropInCall(engine) { _ throws(MooncakeError) in 0 }
}

/// `MC_TRANSFER_TIMEOUT` in milliseconds, if it is set and usable.
private func timeoutFromEnvironment() -> UInt64? {
  guard let value = getenv("MC_TRANSFER_TIMEOUT") else { return nil }
  let text = String(cString: value)
  guard let seconds = UInt64(text), seconds > 0 else {
    Log.warning(
      "MC_TRANSFER_TIMEOUT is \(String(reflecting: text)), not a positive number: ignored")
    return nil
  }
  let (milliseconds, overflow) = seconds.multipliedReportingOverflow(by: 1000)
  return overflow ? .max : milliseconds
}

/// The matrix in `args[0]`, if there is one.
private func readMatrix(
  _ args: UnsafeMutablePointer<UnsafeMutableRawPointer?>?
) throws(MooncakeError) -> NICMatrix? {
  guard let text = args?.pointee?.assumingMemoryBound(to: CChar.self) else { return nil }
  return try NICMatrix(
    json: try messageText(text, "the NIC priority matrix", maximum: NICMatrix.maximumBytes))
}

private func unavailable(_ name: String) -> MooncakeError {
  let known: Set = [
    "rdma", "nvmeof", "nvlink", "nvlink_intra", "hip", "musa", "maca", "cxl", "efa", "cxi", "barex",
    "ascend", "ubshmem", "ub", "nccl", "sunrise_link",
  ]
  if known.contains(name) {
    return MooncakeError(
      .unsupported,
      "transport '\(name)' is not available in this version: install 'tcp', which reaches every "
        + "peer (programs often call the option protocol)")
  }
  return MooncakeError(
    .invalidArgument, "transport '\(name.prefix(100))' is unknown: install 'tcp'")
}
