import MooncakeBase
import MooncakeSystem

/// Calls the RPC daemons of peers. Every call uses a connection of its own, blocks, and ends by its
/// deadline.
package enum RPCClient {
  /// Sends a request and returns the answer's text. A peer without a port is asked at the default
  /// port.
  package static func ask(
    _ peer: HostPort, type: RPCType, body: String,
    settings: HandshakeSettings = .fromEnvironment(), _ call: Call
  ) throws(MooncakeError) -> String {
    let target = HostPort(host: peer.host, port: peer.port ?? settings.defaultPort)
    return try RPCCall(peer: target, type: type, settings: settings, call: call).run(body)
  }

  /// Fetches the segment descriptor of the peer at `name` ("host:port"). `own` is the caller's
  /// descriptor, which the protocol uses as the request.
  package static func fetchDescriptor(
    of name: String, own: String, settings: HandshakeSettings = .fromEnvironment(), _ call: Call
  ) throws(MooncakeError) -> SegmentDescriptor {
    let peer = try parse(name)
    // Responders parse the request but ignore it, so a request that is too long for them may be
    // empty.
    let fits = !own.isEmpty && own.utf8.count < settings.maximumLength
    let answer = try ask(
      peer, type: .metadata, body: fits ? own : "{}", settings: settings, call)
    do throws(MooncakeError) {
      return try SegmentDescriptor(json: answer)
    } catch {
      throw MooncakeError(error.code, "peer \(peer): \(error.message) (metadata RPC)")
    }
  }

  /// Delivers a notification; returns once the peer has taken it.
  package static func notify(
    _ name: String, _ notification: Notification,
    settings: HandshakeSettings = .fromEnvironment(), _ call: Call
  ) throws(MooncakeError) {
    let peer = try parse(name)
    var writer = JSONWriter()
    writer.beginObject()
    writer.member("name", notification.name)
    writer.member("notify_msg", notification.message)
    writer.endObject()
    let body = writer.text
    if body.utf8.count >= settings.maximumLength {
      throw MooncakeError(
        .invalidArgument,
        "peer \(peer): the notification takes \(body.utf8.count) bytes, more than the "
          + "\(settings.maximumLength) of a message; send less or raise MC_HANDSHAKE_MAX_LENGTH "
          + "on both sides")
    }
    let answer = try ask(peer, type: .notify, body: body, settings: settings, call)
    let document = try parse(answer, from: peer, type: .notify)
    let (isTaken, reason) = document.read { value in
      (value["notify_msg"]?.string.map { !$0.isEmpty } ?? false, value["mooncake_error"]?.string)
    }
    if isTaken { return }
    if let reason {
      throw MooncakeError(.full, "peer \(peer): notification refused (notify RPC): \(reason)")
    }
    throw MooncakeError(
      .protocolViolation,
      "peer \(peer): notification not accepted (notify RPC): the peer does not take notifications")
  }

  /// Asks the peer for a sign of life.
  package static func probe(
    _ name: String, settings: HandshakeSettings = .fromEnvironment(), _ call: Call
  ) throws(MooncakeError) {
    let peer = try parse(name)
    let answer = try ask(peer, type: .probe, body: "{}", settings: settings, call)
    _ = try parse(answer, from: peer, type: .probe)
  }

  private static func parse(_ name: String) throws(MooncakeError) -> HostPort {
    do throws(HostPortError) {
      return try HostPort(parsing: name)
    } catch {
      throw MooncakeError(
        .invalidArgument,
        "peer name \(String(reflecting: String(name.prefix(100)))) is not host:port: \(error)")
    }
  }

  private static func parse(
    _ answer: String, from peer: HostPort, type: RPCType
  ) throws(MooncakeError) -> JSONDocument {
    do throws(JSONError) {
      return try JSONDocument(parsing: answer)
    } catch {
      throw MooncakeError(
        .protocolViolation, "peer \(peer): the answer is not JSON (\(type) RPC): \(error)")
    }
  }
}
