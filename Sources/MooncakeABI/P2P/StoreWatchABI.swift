// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Section "Watching" of mooncake_store.h.
import CMooncake
import MooncakeBase
import MooncakeEngine
import MooncakeP2P

extension PayloadWatch: HandleObject {
  static var noun: StaticString { "a watch" }
  static var capacity: Int { 1024 }
}

/// A callback of the host with its context pointer.
private struct HostWatchCallback: @unchecked Sendable {
  // Unchecked: the host must be able to use its context on the library's thread.
  let callback: mooncake_store_watch_callback_t
  let context: UnsafeMutableRawPointer?

  func call(_ change: PayloadChange) {
    let memory = CMemory()
    let kind: Int
    let payload: UnsafePointer<mooncake_payload_info_t>
    switch change {
    case .appeared(let info): (kind, payload) = (MOONCAKE_CHANGE_APPEARED, memory.info(info))
    case .changed(let info): (kind, payload) = (MOONCAKE_CHANGE_CHANGED, memory.info(info))
    case .vanished(let name):
      kind = MOONCAKE_CHANGE_VANISHED
      var gone = mooncake_payload_info_t()
      gone.name = memory.text(name)
      payload = memory.value(gone)
    }
    ThreadState.duringCallback { callback(Int32(kind), payload, context) }
    withExtendedLifetime(memory) {}
  }
}

/// Starts a watch, which calls back with changes of payloads.
@c @implementation
package func mooncake_store_watch_create(
  _ store: OpaquePointer?, _ prefix: UnsafePointer<CChar>?,
  _ watch: UnsafeMutablePointer<OpaquePointer?>?, _ callback: mooncake_store_watch_callback_t?,
  _ context: UnsafeMutableRawPointer?
) -> Int32 {
  nativeCall(store, StoreRecord.self) { record throws(MooncakeError) in
    let output = try checkOutput(watch, "watch")
    guard let callback else { throw MooncakeError(.invalidArgument, "callback is null") }
    let prefix = try prefixText(prefix)
    let host = HostWatchCallback(callback: callback, context: context)
    output.pointee = try HandleTable.shared.insert { () throws(MooncakeError) in
      try record.store.watch(prefix: prefix) { host.call($0) }
    }
  }
}

/// Ends a watch.
@c @implementation
package func mooncake_store_watch_destroy(_ watch: OpaquePointer?) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    try refuseInsideCallback()
    try HandleTable.shared.remove(watch, PayloadWatch.self) { $0.stop() }
  }
}
