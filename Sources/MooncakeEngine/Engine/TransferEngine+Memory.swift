import CLinux
import Glibc
import MooncakeSystem
import Synchronization

/// Memory that the engine allocated.
package final class EngineMemory: Sendable {
  package let mapping: MemoryMapping

  init(byteCount: Int) throws(Errno) { mapping = try .anonymous(byteCount: byteCount) }
}

extension TransferEngine {
  /// Makes a range a buffer of the local segment. The memory stays the caller's and must stay
  /// mapped until it is unregistered.
  public func register(
    _ address: UnsafeMutableRawPointer, length: UInt64, location: String = "*", access: Access
  ) throws(EngineError) {
    let range = (address: UInt64(UInt(bitPattern: address)), length: length)
    try withUnsafePointer(to: range) { pointer throws(EngineError) in
      try register(
        UnsafeBufferPointer(start: pointer, count: 1), location: location, access: access)
    }
  }

  /// Registers all ranges or none.
  package func register(
    _ ranges: UnsafeBufferPointer<(address: UInt64, length: UInt64)>, location: String,
    access: Access
  ) throws(EngineError) {
    try checkOpen()
    if location.utf8.count > 4096 {
      throw EngineError(.invalidArgument, "the location name is longer than 4096 bytes")
    }
    if !access.isSubset(of: [.remoteRead, .remoteWrite]) {
      throw EngineError(.invalidArgument, "access \(access.rawValue) has unknown bits")
    }
    try local.buffers.insert(
      ranges.map {
        BufferTable.Buffer(
          range: RemoteBuffer(address: $0.address, length: $0.length, access: access),
          location: location)
      })
  }

  /// Ends the registration that begins at `address`: no peer touches the memory afterwards.
  public func unregister(_ address: UnsafeMutableRawPointer) throws(EngineError) {
    let value = UInt64(UInt(bitPattern: address))
    try withUnsafePointer(to: value) { pointer throws(EngineError) in
      try unregister(UnsafeBufferPointer(start: pointer, count: 1))
    }
  }

  /// Unregisters every address that is registered; throws for the first that is not.
  package func unregister(_ addresses: UnsafeBufferPointer<UInt64>) throws(EngineError) {
    try checkOpen()
    let removed = local.buffers.remove(Array(addresses))
    if !removed.isEmpty { transport.server.revoke(removed.map(\.range)) }
    let found = Set(removed.map(\.range.address))
    for address in addresses where !found.contains(address) {
      throw EngineError(
        .notRegistered, "no registered buffer begins at 0x\(String(address, radix: 16))")
    }
  }

  /// Allocates zeroed, page-aligned, registered memory that the engine owns.
  public func allocate(
    length: UInt64, location: String = "*", access: Access
  ) throws(EngineError) -> UnsafeMutableRawPointer {
    try checkOpen()
    guard length > 0, length <= UInt64(Int.max) else {
      throw EngineError(.invalidArgument, "cannot allocate \(length) bytes")
    }
    let memory: EngineMemory
    do throws(Errno) { memory = try EngineMemory(byteCount: Int(length)) } catch {
      throw EngineError(.outOfMemory, "allocating \(length) bytes: \(error)")
    }
    let address = memory.mapping.address
    try register(address, length: length, location: location, access: access)
    mappings.withLock { $0[UInt64(UInt(bitPattern: address))] = memory }
    return address
  }

  /// Unregisters and frees memory of `allocate`.
  public func free(_ address: UnsafeMutableRawPointer) throws(EngineError) {
    try checkOpen()
    let key = UInt64(UInt(bitPattern: address))
    guard let memory = mappings.withLock({ $0.removeValue(forKey: key) }) else {
      throw EngineError(
        .notRegistered, "0x\(String(key, radix: 16)) was not allocated by this engine")
    }
    // Peers must have let go of it before it is unmapped.
    defer { withExtendedLifetime(memory) {} }
    try unregister(address)
  }
}
