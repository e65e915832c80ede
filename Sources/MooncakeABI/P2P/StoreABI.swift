// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Sections "Stores", "Deadline, cancel and progress" and "Results" of mooncake_store.h.
import CMooncake
import MooncakeBase
import MooncakeEngine
import MooncakeP2P

/// A store and the engine it works on.
final class StoreRecord: HandleObject {
  static var noun: StaticString { "a store" }
  static var capacity: Int { 1024 }

  let store: P2PStore
  /// An engine's handle.
  let engine: UInt64
  private let isOwnEngine: Bool

  /// Creates a store on the caller's engine.
  init(on engine: UInt64, _ options: P2PStore.Options) throws(MooncakeError) {
    self.engine = engine
    isOwnEngine = false
    store = try EngineTable.shared.with(engine, .native) { record throws(MooncakeError) in
      try P2PStore(record.engine, options)
    }
  }

  /// Creates a store with its own engine.
  init(
    _ engineOptions: TransferEngine.Options, _ options: P2PStore.Options
  ) throws(MooncakeError) {
    engine = try EngineTable.shared.insert(.native) { () throws(MooncakeError) in
      try TransferEngine(engineOptions)
    }
    isOwnEngine = true
    do throws(MooncakeError) {
      store = try EngineTable.shared.with(engine, .native) { record throws(MooncakeError) in
        try P2PStore(record.engine, options)
      }
    } catch {
      try? EngineTable.shared.destroy(engine, .native)
      throw error
    }
  }

  func end() {
    store.close()
    // Fails only if the caller has already destroyed it through the handle that we gave out.
    if isOwnEngine { try? EngineTable.shared.destroy(engine, .native) }
  }
}

/// Writes the defaults.
@c @implementation
package func mooncake_store_options_init(
  _ options: UnsafeMutablePointer<mooncake_store_options_t>?, _ struct_size: UInt32
) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    var values = mooncake_store_options_t()
    values.drain_ms = P2PStore.Options().drainMilliseconds
    try values.write(to: options, "options", size: struct_size)
  }
}

/// Creates a store on an engine or with its own.
@c @implementation
package func mooncake_store_create(
  _ engine: OpaquePointer?, _ engine_options: UnsafePointer<mooncake_engine_options_t>?,
  _ options: UnsafePointer<mooncake_store_options_t>?,
  _ store: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    let output = try checkOutput(store, "store")
    try refuseInsideLogCallback()
    if engine != nil && engine_options != nil {
      throw MooncakeError(
        .invalidArgument, "engine and engine_options are both given: give only one of them")
    }
    let storeOptions = try readOptions(options)
    let engineOptions = try readOptions(engine_options)
    output.pointee = try HandleTable.shared.insert { () throws(MooncakeError) in
      if engine != nil { return try StoreRecord(on: number(of: engine), storeOptions) }
      return try StoreRecord(engineOptions, storeOptions)
    }
  }
}

/// Ends a store.
@c @implementation
package func mooncake_store_destroy(_ store: OpaquePointer?) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    try refuseInsideCallback()
    try HandleTable.shared.remove(store, StoreRecord.self) { $0.end() }
  }
}

/// The engine that a store works on.
@c @implementation
package func mooncake_store_engine(
  _ store: OpaquePointer?, _ engine: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
  nativeCall(store, StoreRecord.self) { record throws(MooncakeError) in
    let output = try checkOutput(engine, "engine")
    output.pointee = OpaquePointer(bitPattern: UInt(record.engine))
  }
}

// MARK: - Operations

extension Cancellation: HandleObject {
  static var noun: StaticString { "a cancellation" }
  static var capacity: Int { 65_536 }
}

/// Creates a cancellation.
@c @implementation
package func mooncake_cancellation_create(
  _ cancellation: UnsafeMutablePointer<OpaquePointer?>?
) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    let output = try checkOutput(cancellation, "cancellation")
    try refuseInsideLogCallback()
    output.pointee = try HandleTable.shared.insert { () throws(MooncakeError) in
      try Cancellation()
    }
  }
}

/// Cancels the operations that use it.
@c @implementation
package func mooncake_cancellation_cancel(_ cancellation: OpaquePointer?) -> Int32 {
  nativeCall(cancellation, Cancellation.self) { cancellation throws(MooncakeError) in
    cancellation.cancel()
  }
}

/// Frees a cancellation.
@c @implementation
package func mooncake_cancellation_destroy(_ cancellation: OpaquePointer?) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    try HandleTable.shared.remove(cancellation, Cancellation.self) { _ in }
  }
}

/// Writes the defaults.
@c @implementation
package func mooncake_store_operation_init(
  _ operation: UnsafeMutablePointer<mooncake_store_operation_t>?, _ struct_size: UInt32
) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    try mooncake_store_operation_t().write(to: operation, "operation", size: struct_size)
  }
}

// MARK: - Results

/// The contents of a result.
@c @implementation
package func mooncake_store_result_read(
  _ result: OpaquePointer?,
  _ report: UnsafeMutablePointer<UnsafePointer<mooncake_store_report_t>?>?
) -> Int32 {
  nativeCall(result, StoreReport.self) { result throws(MooncakeError) in
    let output = try checkOutput(report, "report")
    output.pointee = result.contents
  }
}

/// Frees a result.
@c @implementation
package func mooncake_store_result_free(_ result: OpaquePointer?) -> Int32 {
  nativeCall { () throws(MooncakeError) in
    try HandleTable.shared.remove(result, StoreReport.self) { _ in }
  }
}
