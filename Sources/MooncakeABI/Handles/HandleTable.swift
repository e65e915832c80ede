// Handles of everything but engines, which have their own lock-free table. A handle looks like a
// pointer to C but is a number that is never reused: nothing a caller passes is ever dereferenced.
import CMooncake
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// An object that a handle of mooncake.h may refer to.
protocol HandleObject: AnyObject, Sendable {
  /// For messages, such as "a store".
  static var noun: StaticString { get }
  /// How many of them a process may have.
  static var capacity: Int { get }
}

/// The objects that C programs refer to by handles.
final class HandleTable: Sendable {
  private struct Entry: Sendable {
    let object: any HandleObject
    /// Calls that are using it.
    var userCount = 0
    var isClosing = false
  }

  private struct State: Sendable {
    var entries: [UInt64: Entry] = [:]
    var last: UInt64 = 0
    /// Objects of each type, including those being created.
    var counts: [ObjectIdentifier: Int] = [:]
  }
  private let state = Lock(State())

  // Replaced only in a forked child, before it has a second thread: a thread of the parent may have
  // held the lock at the fork, and the objects' threads do not exist in the child.
  private nonisolated(unsafe) static var current = HandleTable()

  static var shared: HandleTable {
    Globals.prepare()
    return current
  }

  static func prepare() {
    _ = current
    Fork.inChild { HandleTable.forget() }
  }

  private static func forget() {
    // Keep the old objects: their threads cannot be joined.
    _ = Unmanaged.passRetained(current)
    current = HandleTable()
    current.state.withLock { $0.last = UInt64(getpid()) << 32 }
  }

  /// Creates an object and a handle for it.
  func insert<Object: HandleObject>(
    _ make: () throws(MooncakeError) -> Object
  ) throws(MooncakeError) -> OpaquePointer? {
    let type = ObjectIdentifier(Object.self)
    let hasRoom = state.withLock { state in
      if state.counts[type, default: 0] >= Object.capacity { return false }
      state.counts[type, default: 0] += 1
      return true
    }
    if !hasRoom {
      throw MooncakeError(
        .full,
        "the process has \(Object.capacity) handles of this kind (\(Object.noun)): end one first")
    }
    let object: Object
    do throws(MooncakeError) { object = try make() } catch {
      state.withLock { $0.counts[type, default: 1] -= 1 }
      throw error
    }
    let handle = state.withLock { state in
      state.last += 1
      // Odd, so that it is never an aligned pointer; the bits of an engine handle's kind are 0.
      let handle = state.last << 3 | 1
      state.entries[handle] = Entry(object: object)
      return handle
    }
    return OpaquePointer(bitPattern: UInt(handle))
  }

  /// Runs `body` with the object behind a handle; `remove` waits until it returns.
  func with<Object: HandleObject, Value>(
    _ handle: OpaquePointer?, _ type: Object.Type,
    _ body: (Object) throws(MooncakeError) -> Value
  ) throws(MooncakeError) -> Value {
    try refuseInsideLogCallback()
    let key = number(of: handle)
    let object = try acquire(key, type)
    defer { release(key) }
    return try body(object)
  }

  /// Refuses further calls, runs `close`, which must make the calls inside return, and releases the
  /// object when they have.
  func remove<Object: HandleObject>(
    _ handle: OpaquePointer?, _ type: Object.Type, _ close: (Object) -> Void
  ) throws(MooncakeError) {
    try refuseInsideLogCallback()
    let key = number(of: handle)
    let object = try acquire(key, type, isClosing: true)
    close(object)
    while state.withLock({ ($0.entries[key]?.userCount ?? 0) > 1 }) { usleep(50) }
    let entry = state.withLock { state in
      state.counts[ObjectIdentifier(type), default: 1] -= 1
      return state.entries.removeValue(forKey: key)
    }
    // Released outside the lock, because its deinit may take time.
    _ = entry
  }

  private func release(_ key: UInt64) {
    // If not, a callback of this call has forked and this is the child, where the lock may be held
    // forever.
    if self === Self.shared { state.withLock { $0.entries[key]?.userCount -= 1 } }
  }

  private func acquire<Object: HandleObject>(
    _ key: UInt64, _ type: Object.Type, isClosing: Bool = false
  ) throws(MooncakeError) -> Object {
    let object: Object? = state.withLock { state in
      guard let entry = state.entries[key], !entry.isClosing, let object = entry.object as? Object
      else { return nil }
      state.entries[key]?.userCount += 1
      state.entries[key]?.isClosing = isClosing
      return object
    }
    if let object { return object }
    throw MooncakeError(
      .invalidHandle,
      "the handle is null, foreign, from before a fork, or of \(Object.noun) that was ended")
  }
}
