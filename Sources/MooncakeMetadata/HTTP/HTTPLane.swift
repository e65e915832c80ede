import CCurl
import Glibc
import MooncakeBase
import MooncakeSystem

/// One libcurl handle with its connections, used by one thread at a time.
final class HTTPLane: @unchecked Sendable {
  // Unchecked: the client gives it to one caller at a time.
  /// Bytes of an answer; a larger one is not from a metadata service.
  static let answerLimit = 256 << 20
  static let connectMilliseconds = 1500

  private let curl: CurlLibrary
  private let tls: TLSFiles
  private let easy: CurlLibrary.Handle
  private let multi: CurlLibrary.Handle
  private let errorBuffer = UnsafeMutablePointer<CChar>.allocate(capacity: Int(CURL_ERROR_SIZE))

  // State of the current request.
  private var received: [UInt8] = []
  private var end: LineMark?
  private var stopReason = StopReason.none

  private enum StopReason { case none, enough, tooLong }

  init?(_ curl: CurlLibrary, _ tls: TLSFiles) {
    guard let easy = CurlLibrary.contained({ curl.easyInit() }) else { return nil }
    guard let multi = CurlLibrary.contained({ curl.multiInit() }) else {
      curl.easyCleanup(easy)
      return nil
    }
    self.curl = curl
    self.tls = tls
    self.easy = easy
    self.multi = multi
  }

  deinit {
    CurlLibrary.contained {
      curl.easyCleanup(easy)
      _ = curl.multiCleanup(multi)
    }
    errorBuffer.deallocate()
  }

  func perform(
    _ request: HTTPRequest, _ addresses: [SocketAddress], _ call: Call
  ) throws(HTTPFailure) -> HTTPResponse {
    received = []
    end = request.end
    stopReason = .none
    errorBuffer.pointee = 0
    var lists: [UnsafeMutablePointer<curl_slist>] = []
    defer { for list in lists { curl.freeList(list) } }
    // The body must outlive the transfer, because libcurl reads it in place.
    let body = request.body ?? []
    let result = body.withUnsafeBytes { bytes in
      Result { () throws(HTTPFailure) in
        prepare(request, addresses, request.body == nil ? nil : bytes, &lists)
        return try transfer(call)
      }
    }
    let code: CURLcode
    do throws(HTTPFailure) {
      code = try result.get()
      if code != CURLE_OK && stopReason != .enough { throw failure(code, call) }
    } catch {
      var failure = error
      failure.isUnsent = sentByteCount == 0
      throw failure
    }
    var status = 0
    _ = curl_get_number(curl.getInformation, easy, CURLINFO_RESPONSE_CODE, &status)
    defer { received = [] }
    return HTTPResponse(status: status, body: received)
  }

  /// Bytes sent of the latest request, including its head.
  private var sentByteCount: Int {
    var count = 0
    let isKnown =
      curl_get_number(curl.getInformation, easy, CURLINFO_REQUEST_SIZE, &count) == CURLE_OK
    return isKnown ? count : .max
  }

  // MARK: Options

  private func set(_ option: CURLoption, _ value: Int) {
    _ = curl_set_number(curl.setOption, easy, option, value)
  }

  private func set(_ option: CURLoption, _ text: String) {
    _ = text.withCString { curl_set_pointer(curl.setOption, easy, option, $0) }
  }

  private func prepare(
    _ request: HTTPRequest, _ addresses: [SocketAddress], _ body: UnsafeRawBufferPointer?,
    _ lists: inout [UnsafeMutablePointer<curl_slist>]
  ) {
    curl.easyReset(easy)
    // Signals belong to the host; redirects and proxies would lead to servers that nobody named.
    set(CURLOPT_NOSIGNAL, 1)
    set(CURLOPT_PROXY, "")
    set(CURLOPT_PROTOCOLS, request.isSecure ? 2 : 1)
    set(CURLOPT_CONNECTTIMEOUT_MS, Self.connectMilliseconds)
    set(CURLOPT_TCP_KEEPALIVE, 1)
    set(CURLOPT_URL, "\(request.isSecure ? "https" : "http")://\(request.server)\(request.target)")
    set(CURLOPT_CUSTOMREQUEST, request.method.rawValue)
    _ = curl_set_pointer(curl.setOption, easy, CURLOPT_ERRORBUFFER, errorBuffer)
    _ = curl_set_writer(
      curl.setOption, easy,
      { bytes, size, count, context in
        guard let bytes, let context else { return 0 }
        let lane = Unmanaged<HTTPLane>.fromOpaque(context).takeUnretainedValue()
        return lane.receive(UnsafeRawBufferPointer(start: bytes, count: size &* count))
      }, Unmanaged.passUnretained(self).toOpaque())
    if let body {
      set(CURLOPT_POSTFIELDSIZE, body.count)
      // An empty array may have a null address, which would make libcurl read standard input.
      let empty: StaticString = ""
      _ = curl_set_pointer(
        curl.setOption, easy, CURLOPT_POSTFIELDS, body.baseAddress ?? .init(empty.utf8Start))
    }
    if request.isOnce {
      set(CURLOPT_FRESH_CONNECT, 1)
      set(CURLOPT_FORBID_REUSE, 1)
    }
    if let credentials = request.credentials { set(CURLOPT_USERPWD, credentials) }
    if request.isSecure { prepareTLS() }
    // Without the empty Expect header, libcurl waits a second for servers that do not support it.
    setList(CURLOPT_HTTPHEADER, request.headers + ["Expect:"], &lists)
    if SocketAddress(numeric: request.server.host, port: 0) == nil {
      let hosts = addresses.map { $0.isIPv6 ? "[\($0.host)]" : $0.host }.joined(separator: ",")
      setList(
        CURLOPT_RESOLVE, ["\(request.server.host):\(request.server.port ?? 80):\(hosts)"], &lists)
    }
  }

  private func prepareTLS() {
    set(CURLOPT_SSLVERSION, Int(CURL_SSLVERSION_TLSv1_2))
    if let file = tls.authority { set(CURLOPT_CAINFO, file) }
    if let file = tls.certificate { set(CURLOPT_SSLCERT, file) }
    if let file = tls.key { set(CURLOPT_SSLKEY, file) }
  }

  private func setList(
    _ option: CURLoption, _ texts: [String], _ lists: inout [UnsafeMutablePointer<curl_slist>]
  ) {
    var list: UnsafeMutablePointer<curl_slist>?
    for text in texts { list = curl.appendToList(list, text) ?? list }
    guard let list else { return }
    lists.append(list)
    _ = curl_set_pointer(curl.setOption, easy, option, list)
  }

  private func receive(_ bytes: UnsafeRawBufferPointer) -> Int {
    if received.count + bytes.count > Self.answerLimit {
      stopReason = .tooLong
      return 0
    }
    received.append(contentsOf: bytes)
    if end?.isFound(in: received) == true {
      stopReason = .enough
      return 0
    }
    return bytes.count
  }

  // MARK: Transfer

  private func transfer(_ call: Call) throws(HTTPFailure) -> CURLcode {
    guard curl.multiAdd(multi, easy) == CURLM_OK else {
      throw HTTPFailure(code: .system, cause: "libcurl refuses the request", remedy: "see its log")
    }
    // Also closes the connection of a request that was given up.
    defer { CurlLibrary.contained { _ = curl.multiRemove(multi, easy) } }
    while true {
      var running: Int32 = 0
      CurlLibrary.contained { _ = curl.multiPerform(multi, &running) }
      if running == 0 { break }
      if call.deadline.hasPassed { throw late() }
      var extra = curl_waitfd(fd: call.cancellation, events: Int16(CURL_WAIT_POLLIN), revents: 0)
      let wait = call.deadline.remainingMilliseconds
      _ = curl.multiPoll(
        multi, &extra, call.cancellation < 0 ? 0 : 1, wait < 0 ? 1000 : min(wait, 1000), nil)
      if extra.revents != 0 { throw .canceled }
    }
    var left: Int32 = 0
    guard let message = curl.multiRead(multi, &left) else { return CURLE_FAILED_INIT }
    return message.pointee.data.result
  }

  private func late() -> HTTPFailure {
    HTTPFailure(
      code: .timeout, cause: "no answer before the deadline",
      remedy: "is the service stopped or overloaded?")
  }

  private func failure(_ code: CURLcode, _ call: Call) -> HTTPFailure {
    let text =
      errorBuffer.pointee == 0
      ? String(cString: curl.errorText(code))
      : String(cString: errorBuffer)
    switch code {
    case CURLE_WRITE_ERROR where stopReason == .tooLong:
      return HTTPFailure(
        code: .protocolViolation, cause: "an answer of more than \(Self.answerLimit) bytes",
        remedy: "is this the metadata service?")
    case CURLE_COULDNT_CONNECT:
      return HTTPFailure(
        code: .unreachable, cause: text, remedy: "does the service run, and is this its address?")
    case CURLE_OPERATION_TIMEDOUT:
      return HTTPFailure(
        code: call.deadline.hasPassed ? .timeout : .unreachable, cause: text,
        remedy: "is the host up, and does no firewall drop the packets?")
    case CURLE_SSL_CONNECT_ERROR where !HTTPRefusal.isLasting(handshake: text):
      return HTTPFailure(
        code: .unreachable, cause: text,
        remedy: "the connection ended during the TLS handshake: is the service up, and does it "
          + "speak TLS?")
    case CURLE_PEER_FAILED_VERIFICATION, CURLE_SSL_CERTPROBLEM, CURLE_SSL_CACERT_BADFILE,
      CURLE_SSL_CONNECT_ERROR, CURLE_SSL_ISSUER_ERROR, CURLE_SSL_CIPHER:
      return HTTPFailure(
        code: .accessDenied, cause: text,
        remedy: "check the certificate files on both sides, and that both speak TLS")
    case CURLE_WEIRD_SERVER_REPLY, CURLE_UNSUPPORTED_PROTOCOL, CURLE_BAD_CONTENT_ENCODING:
      return HTTPFailure(
        code: .protocolViolation, cause: text, remedy: "is this the metadata service?")
    case CURLE_OUT_OF_MEMORY:
      return HTTPFailure(code: .outOfMemory, cause: text, remedy: "free memory")
    default:
      return HTTPFailure(
        code: .unreachable, cause: text,
        remedy: "the service may have restarted; a client with TLS needs a service with TLS")
    }
  }
}
