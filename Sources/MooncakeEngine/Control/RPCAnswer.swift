import MooncakeBase

/// The RPC daemon's answer to each kind of request.
package enum RPCAnswer {
  /// The answer to a call that no service takes.
  package static let noService = #"{"error":"no such service"}"#

  /// The JSON answer to a message; throws if its body is not JSON. `keeps` becomes true for a
  /// service call whose sender wants to keep the connection for more.
  package static func body(
    to message: RPCMessage, handlers: RPCServer.Handlers, keeps: inout Bool
  ) throws(JSONError) -> String {
    let document = try JSONDocument(parsing: message.body)
    switch message.type {
    case .metadata: return handlers.descriptor() ?? "null"
    case .probe: return #"{"status":"success"}"#
    case .notify: return document.read { notified($0, handlers) }
    case .connection: return document.read { rejection(of: $0) }
    case .service:
      return document.read { call in
        keeps = call["keep"]?.isTrue ?? false
        return handlers.service(call) ?? noService
      }
    }
  }

  /// An empty `notify_msg` tells senders of every version that the message was not taken.
  private static func notified(_ request: JSONValue, _ handlers: RPCServer.Handlers) -> String {
    let refusal: String?
    if let name = request["name"]?.string, let message = request["notify_msg"]?.string {
      refusal = handlers.notify(Notification(name: name, message: message))
    } else {
      refusal = "name and notify_msg must be strings"
    }
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("name", "")
    writer.member("notify_msg", refusal == nil ? "success" : "")
    if let refusal { writer.member("mooncake_error", refusal) }
    writer.endObject()
    return writer.text
  }

  /// Every field has exactly the type that initiators expect: they abort on any other.
  private static func rejection(of request: JSONValue) -> String {
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("local_nic_path", request["peer_nic_path"]?.string ?? "")
    writer.member("peer_nic_path", request["local_nic_path"]?.string ?? "")
    writer.member("local_lid", 0)
    writer.member("local_gid", "")
    writer.name("qp_num")
    writer.beginArray()
    writer.endArray()
    writer.member("reply_msg", "this engine has no RDMA transport")
    writer.member("payload", "")
    writer.endObject()
    return writer.text
  }
}
