/// One request to a metadata server and its answer.
final class MetadataExchange {
  enum Method { case get, put, post, delete, other }

  struct Answer: Sendable {
    var status: UInt32
    var body: [UInt8]
    var isJSON = false

    init(_ status: UInt32, _ text: String, isJSON: Bool = false) {
      self.init(status, Array(text.utf8), isJSON: isJSON)
    }

    init(_ status: UInt32, _ body: [UInt8], isJSON: Bool = false) {
      self.status = status
      self.body = body
      self.isJSON = isJSON
    }
  }

  /// A wait for changes.
  struct Watch {
    var prefix: String
    /// The revision up to which nothing has matched.
    var seen: UInt64
    /// Deadline on `Clock`, in nanoseconds.
    var end: UInt64
  }

  let connection: OpaquePointer
  let method: Method
  let path: String
  var body: [UInt8] = []
  /// The body exceeds the limit; the rest is discarded as it arrives.
  var isTooLarge = false
  var answer: Answer?
  /// Bytes of the answer, until the client has taken it.
  var sentBytes = 0
  var watch: Watch?
  /// Whether only a real client would send it: it is authorized and not a health check.
  var isUseful: Bool { isAuthorized && path != "/health" }
  var isAuthorized = true

  init(_ connection: OpaquePointer, method: String, path: String) {
    self.connection = connection
    self.path = path
    self.method =
      switch method {
      case "GET": .get
      case "PUT": .put
      case "POST": .post
      case "DELETE": .delete
      default: .other
      }
  }
}
