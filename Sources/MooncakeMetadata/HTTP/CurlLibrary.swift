import CCurl
import MooncakeBase
import MooncakeSystem
import Synchronization

/// The functions of libcurl, opened when the first client needs them.
struct CurlLibrary: Sendable {
  typealias Handle = UnsafeMutableRawPointer

  // Addresses of variadic functions, for the shim.
  nonisolated(unsafe) let setOption: UnsafeMutableRawPointer
  nonisolated(unsafe) let getInformation: UnsafeMutableRawPointer
  let easyInit: @convention(c) () -> Handle?
  let easyReset: @convention(c) (Handle) -> Void
  let easyCleanup: @convention(c) (Handle) -> Void
  let errorText: @convention(c) (CURLcode) -> UnsafePointer<CChar>
  let appendToList:
    @convention(c) (UnsafeMutablePointer<curl_slist>?, UnsafePointer<CChar>) ->
      UnsafeMutablePointer<curl_slist>?
  let freeList: @convention(c) (UnsafeMutablePointer<curl_slist>?) -> Void
  let multiInit: @convention(c) () -> Handle?
  let multiAdd: @convention(c) (Handle, Handle) -> CURLMcode
  let multiRemove: @convention(c) (Handle, Handle) -> CURLMcode
  let multiPerform: @convention(c) (Handle, UnsafeMutablePointer<Int32>) -> CURLMcode
  let multiPoll:
    @convention(c) (
      Handle, UnsafeMutablePointer<curl_waitfd>?, UInt32, Int32, UnsafeMutablePointer<Int32>?
    ) -> CURLMcode
  let multiRead:
    @convention(c) (Handle, UnsafeMutablePointer<Int32>) -> UnsafeMutablePointer<CURLMsg>?
  let multiCleanup: @convention(c) (Handle) -> CURLMcode

  private static let loaded: Result<CurlLibrary, MooncakeError> = load()

  private static let isPrepared = Atomic(false)

  /// The library, loaded once.
  static func shared() throws(MooncakeError) -> CurlLibrary {
    Fork.prepare(isPrepared) { _ = loaded }
    return try loaded.get()
  }

  /// Runs libcurl calls that use connections, possibly on the host's thread: the host gets no
  /// signal, no connection takes the number of a standard stream, and no forked child inherits a
  /// lock.
  static func contained<Value>(_ body: () -> Value) -> Value {
    FileDescriptor.fillStandard()
    return withoutWriteSignals { Fork.excluded(body) }
  }

  private static func load() -> Result<CurlLibrary, MooncakeError> {
    guard let library = DynamicLibrary("libcurl.so.4") else {
      return .failure(
        MooncakeError(
          .unsupported,
          "metadata over HTTP needs libcurl.so.4: install the Debian package libcurl4"))
    }
    // curl_multi_poll (7.66) is the newest function used here.
    guard let functions = CurlLibrary(library) else {
      return .failure(
        MooncakeError(
          .unsupported, "libcurl.so.4 is older than 7.66: update the Debian package libcurl4"))
    }
    typealias Start = @convention(c) (Int) -> CURLcode
    guard let start = library.symbol("curl_global_init"),
      unsafeBitCast(start, to: Start.self)(3) == CURLE_OK
    else { return .failure(MooncakeError(.system, "libcurl cannot be initialized")) }
    return .success(functions)
  }

  private init?(_ library: DynamicLibrary) {
    func find<Function>(_ name: String, _ type: Function.Type) -> Function? {
      library.symbol(name).map { unsafeBitCast($0, to: type) }
    }
    guard let setOption = library.symbol("curl_easy_setopt"),
      let getInformation = library.symbol("curl_easy_getinfo"),
      let easyInit = find("curl_easy_init", type(of: easyInit)),
      let easyReset = find("curl_easy_reset", type(of: easyReset)),
      let easyCleanup = find("curl_easy_cleanup", type(of: easyCleanup)),
      let errorText = find("curl_easy_strerror", type(of: errorText)),
      let appendToList = find("curl_slist_append", type(of: appendToList)),
      let freeList = find("curl_slist_free_all", type(of: freeList)),
      let multiInit = find("curl_multi_init", type(of: multiInit)),
      let multiAdd = find("curl_multi_add_handle", type(of: multiAdd)),
      let multiRemove = find("curl_multi_remove_handle", type(of: multiRemove)),
      let multiPerform = find("curl_multi_perform", type(of: multiPerform)),
      let multiPoll = find("curl_multi_poll", type(of: multiPoll)),
      let multiRead = find("curl_multi_info_read", type(of: multiRead)),
      let multiCleanup = find("curl_multi_cleanup", type(of: multiCleanup))
    else { return nil }
    self.setOption = setOption
    self.getInformation = getInformation
    self.easyInit = easyInit
    self.easyReset = easyReset
    self.easyCleanup = easyCleanup
    self.errorText = errorText
    self.appendToList = appendToList
    self.freeList = freeList
    self.multiInit = multiInit
    self.multiAdd = multiAdd
    self.multiRemove = multiRemove
    self.multiPerform = multiPerform
    self.multiPoll = multiPoll
    self.multiRead = multiRead
    self.multiCleanup = multiCleanup
  }
}
