import MooncakeBase

extension EtcdService {
  package func getRevised(
    _ key: String, isText: Bool, _ call: Call
  ) throws(MooncakeError) -> RevisedValue? {
    let phase = "get '\(key)'"
    return try ask("/v3/kv/range", phase, call) {
      $0.member("key", encoded(key))
    } answer: { value throws(MooncakeError) in
      guard let found = value["kvs"]?.elements.first(where: { _ in true }) else { return nil }
      let bytes = try bytes(found, "value", phase)
      let revision = number(found["mod_revision"])
      if !isText { return RevisedValue(String(decoding: bytes, as: UTF8.self), revision: revision) }
      guard let text = String(validating: bytes, as: UTF8.self) else {
        throw client.failure(
          .protocolViolation, phase, "the value is not UTF-8", "remove the key, or correct it")
      }
      return RevisedValue(text, revision: revision)
    }
  }

  /// One transaction for as many keys as etcd allows by default.
  package func values(
    of keys: [String], _ call: Call
  ) throws(MooncakeError) -> [String?] {
    var values: [String?] = []
    while values.count < keys.count {
      let part = keys[values.count...].prefix(Self.transactionCount)
      try ask("/v3/kv/txn", "get keys", call) { writer in
        writer.name("success")
        writer.beginArray()
        for key in part {
          writer.beginObject()
          writer.name("request_range")
          writer.beginObject()
          writer.member("key", encoded(key))
          writer.endObject()
          writer.endObject()
        }
        writer.endArray()
      } answer: { value throws(MooncakeError) in
        let count = values.count
        for response in value["responses"]?.elements ?? .none {
          let found = response["response_range"]?["kvs"]?.elements.first { _ in true }
          values.append(
            try found.map { pair throws(MooncakeError) in
              String(decoding: try bytes(pair, "value", "get keys"), as: UTF8.self)
            })
        }
        if values.count != count + part.count { throw malformed("get keys") }
      }
    }
    return values
  }

  package func replace(
    _ key: String, writtenBy revision: UInt64, with value: String?, _ call: Call
  ) throws(MooncakeError) -> Bool {
    let phase = "\(value == nil ? "delete" : "put") '\(key)' if unchanged"
    var isRepeated = false
    let isDone = try ask("/v3/kv/txn", phase, call, isRepeated: &isRepeated) { writer in
      writer.name("compare")
      writer.beginArray()
      writer.beginObject()
      writer.member("key", encoded(key))
      writer.member("target", "MOD")
      writer.member("mod_revision", String(revision))
      writer.endObject()
      writer.endArray()
      writer.name("success")
      writer.beginArray()
      writer.beginObject()
      writer.name(value == nil ? "request_delete_range" : "request_put")
      writer.beginObject()
      writer.member("key", encoded(key))
      if let value { writer.member("value", encoded(value)) }
      writer.endObject()
      writer.endObject()
      writer.endArray()
    } answer: {
      $0["succeeded"]?.isTrue ?? false
    }
    // An earlier attempt that seemed to fail may have taken effect.
    if isDone || !isRepeated { return isDone }
    return try get(key, call) == value
  }
}
