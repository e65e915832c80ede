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
    /// Up to where nothing has matched.
    var seen: UInt64
    /// On `Clock`, in nanoseconds.
    var end: UInt64
  }

  let connection: OpaquePointer
  let method: Method
  let path: String
  var body: [UInt8] = []
  /// More was sent than may be kept; the rest is thrown away as it comes.
  var isTooLarge = false
  var answer: Answer?
  /// Of the answer, until it has been taken.
  var sentBytes = 0
  var watch: Watch?
  /// It was not for everybody, so that its client is one who belongs here.
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
