import CMicroHTTP
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// The functions of libmicrohttpd, opened when the first server needs them.
struct MicroHTTPLibrary: Sendable {
  // Addresses of variadic functions, for the shim.
  nonisolated(unsafe) let start: UnsafeMutableRawPointer
  nonisolated(unsafe) let information: UnsafeMutableRawPointer
  let stop: @convention(c) (OpaquePointer) -> Void
  let run: @convention(c) (OpaquePointer) -> MHD_Result
  let add: @convention(c) (OpaquePointer, Int32, UnsafePointer<sockaddr>, socklen_t) -> MHD_Result
  let timeout: @convention(c) (OpaquePointer, UnsafeMutablePointer<UInt64>) -> MHD_Result
  let argument:
    @convention(c) (
      OpaquePointer, UInt32, UnsafePointer<CChar>, Int,
      UnsafeMutablePointer<UnsafePointer<CChar>?>, UnsafeMutablePointer<Int>
    ) -> MHD_Result
  let suspend: @convention(c) (OpaquePointer) -> Void
  let resume: @convention(c) (OpaquePointer) -> Void
  let response: @convention(c) (Int, UnsafeMutableRawPointer?, UInt32) -> OpaquePointer?
  let addHeader:
    @convention(c) (OpaquePointer, UnsafePointer<CChar>, UnsafePointer<CChar>) -> MHD_Result
  let queue: @convention(c) (OpaquePointer, UInt32, OpaquePointer) -> MHD_Result
  let freeResponse: @convention(c) (OpaquePointer) -> Void

  static let yes = MHD_Result(rawValue: 1)!
  static let no = MHD_Result(rawValue: 0)!

  private static let isPrepared = Atomic(false)
  private static let loaded: MicroHTTPLibrary? = MicroHTTPLibrary()

  /// The library, loaded once.
  static func shared() throws(MooncakeError) -> MicroHTTPLibrary {
    Fork.prepare(isPrepared) { _ = (loaded, yes, no) }
    if let loaded { return loaded }
    throw MooncakeError(
      .unsupported,
      "a metadata server needs libmicrohttpd.so.12: install the Debian package libmicrohttpd12")
  }

  private init?() {
    guard let library = DynamicLibrary("libmicrohttpd.so.12") else { return nil }
    func find<Function>(_ name: String, _ type: Function.Type) -> Function? {
      library.symbol(name).map { unsafeBitCast($0, to: type) }
    }
    guard let start = library.symbol("MHD_start_daemon"),
      let information = library.symbol("MHD_get_daemon_info"),
      let stop = find("MHD_stop_daemon", type(of: stop)),
      let run = find("MHD_run", type(of: run)),
      let add = find("MHD_add_connection", type(of: add)),
      let timeout = find("MHD_get_timeout", type(of: timeout)),
      let argument = find("MHD_lookup_connection_value_n", type(of: argument)),
      let suspend = find("MHD_suspend_connection", type(of: suspend)),
      let resume = find("MHD_resume_connection", type(of: resume)),
      let response = find("MHD_create_response_from_buffer", type(of: response)),
      let addHeader = find("MHD_add_response_header", type(of: addHeader)),
      let queue = find("MHD_queue_response", type(of: queue)),
      let freeResponse = find("MHD_destroy_response", type(of: freeResponse))
    else { return nil }
    self.start = start
    self.information = information
    self.stop = stop
    self.run = run
    self.add = add
    self.timeout = timeout
    self.argument = argument
    self.suspend = suspend
    self.resume = resume
    self.response = response
    self.addHeader = addHeader
    self.queue = queue
    self.freeResponse = freeResponse
  }
}
