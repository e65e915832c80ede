// Per-thread state of the callers: the text of the last failure, and whether the thread is inside a
// callback. It is malloc'd memory behind a pthread key, so it needs no runtime support and is freed
// with the thread.
import Glibc
import MooncakeEngine

/// The calling thread's state.
struct ThreadState {
  private var message: UnsafeMutablePointer<CChar>?
  private var capacity = 0
  private var callbackDepth = 0
  private var logCallbackDepth = 0

  /// Longer messages are truncated.
  private static let maximumMessageBytes = 8192

  private static let key: pthread_key_t = {
    var key = pthread_key_t()
    // Without a key there are no messages, but everything else works.
    let result = pthread_key_create(&key) { state in
      guard let state else { return }
      free(state.assumingMemoryBound(to: ThreadState.self).pointee.message)
      free(state)
    }
    return result == 0 ? key : pthread_key_t.max
  }()

  @inline(__always)
  private static var existing: UnsafeMutablePointer<ThreadState>? {
    pthread_getspecific(key)?.assumingMemoryBound(to: ThreadState.self)
  }

  private static func obtain() -> UnsafeMutablePointer<ThreadState>? {
    if let existing { return existing }
    guard let memory = malloc(MemoryLayout<ThreadState>.size) else { return nil }
    let state = memory.bindMemory(to: ThreadState.self, capacity: 1)
    state.initialize(to: ThreadState())
    guard pthread_setspecific(key, state) == 0 else {
      free(memory)
      return nil
    }
    return state
  }

  private init() {}

  static func prepare() { _ = key }

  // MARK: - Message

  /// NUL-terminated; nil before the first failure.
  static var message: UnsafePointer<CChar>? { UnsafePointer(existing?.pointee.message) }

  /// Replaces the message by "function: cause".
  static func setMessage(_ function: StaticString, _ cause: String) {
    guard let state = obtain() else { return }
    // Callers know only the part of #function before the argument labels.
    let name = UnsafeBufferPointer(start: function.utf8Start, count: function.utf8CodeUnitCount)
      .prefix { $0 != UInt8(ascii: "(") }
    var cause = cause
    cause.withUTF8 { cause in
      let causeCount = min(cause.count, maximumMessageBytes - name.count)
      let size = name.count + 2 + causeCount + 1
      guard state.pointee.reserve(size), let start = state.pointee.message else { return }
      var end = UnsafeMutableRawPointer(start)
      func append(_ bytes: UnsafeBufferPointer<UInt8>, _ count: Int) {
        if count > 0, let base = bytes.baseAddress { memcpy(end, base, count) }
        end += count
      }
      append(UnsafeBufferPointer(rebasing: name), name.count)
      end.storeBytes(of: UInt8(ascii: ":"), as: UInt8.self)
      (end + 1).storeBytes(of: UInt8(ascii: " "), as: UInt8.self)
      end += 2
      append(cause, causeCount)
      end.storeBytes(of: 0, as: UInt8.self)
    }
  }

  private mutating func reserve(_ size: Int) -> Bool {
    if size <= capacity { return true }
    guard let larger = realloc(message, max(size, 256)) else { return false }
    message = larger.assumingMemoryBound(to: CChar.self)
    capacity = max(size, 256)
    return true
  }

  // MARK: - Callbacks

  /// Whether the thread is inside a callback of the host other than the log's.
  static var isInsideCallback: Bool {
    (existing?.pointee.callbackDepth ?? 0) > 0
  }

  /// Whether the thread is inside the host's log callback.
  @inline(__always)
  static var isInsideLogCallback: Bool { (existing?.pointee.logCallbackDepth ?? 0) > 0 }

  /// Runs a callback of the host other than the log's.
  static func duringCallback<Value>(_ body: () -> Value) -> Value {
    guard let state = obtain() else { return body() }
    state.pointee.callbackDepth += 1
    defer { state.pointee.callbackDepth = max(0, state.pointee.callbackDepth - 1) }
    return body()
  }

  /// Runs the host's log callback.
  static func duringLogCallback(_ body: () -> Void) {
    guard let state = obtain() else { return body() }
    state.pointee.logCallbackDepth += 1
    body()
    state.pointee.logCallbackDepth = max(0, state.pointee.logCallbackDepth - 1)
  }

  /// Tells a forked child that its only thread is no longer inside callbacks.
  static func forgetCallbacks() {
    existing?.pointee.callbackDepth = 0
    existing?.pointee.logCallbackDepth = 0
  }
}
