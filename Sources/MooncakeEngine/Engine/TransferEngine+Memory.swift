import CLinux
import Glibc
import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// Memory that the engine allocated.
package final class EngineMemory: Sendable {
  package let mapping: MemoryMapping
  /// Identifies it to peers that can map it; nil for memory private to this process.
  package let number: UInt32?
  private let file: MemoryFile?
  private let hasComplained = Atomic<Bool>(false)

  init(byteCount: Int, node: UInt32?) throws(Errno) {
    mapping = try .anonymous(byteCount: byteCount)
    Self.place(mapping, node)
    number = nil
    file = nil
  }

  init(sharing number: UInt32, byteCount: Int, node: UInt32?) throws(Errno) {
    let file = try MemoryFile(name: "mooncake-memory", byteCount: byteCount)
    mapping = try file.map(writable: true)
    Self.place(mapping, node)
    mapping.gatherHugePages()
    self.number = number
    self.file = consume file
  }

  private static func place(_ mapping: borrowing MemoryMapping, _ node: UInt32?) {
    guard let node else { return }
    do throws(Errno) { try mapping.prefer(node: node) } catch {
      Log.info("memory near NUMA node \(node): \(error); it may come from any node")
    }
  }

  /// Where a range lies in this memory; nil if it lies elsewhere or peers cannot map it.
  func place(_ address: UInt64, _ length: UInt64) -> BufferTable.SharedPlace? {
    let offset = address &- UInt64(UInt(bitPattern: mapping.address))
    let size = UInt64(mapping.count)
    guard let number, offset < size, length <= size - offset else { return nil }
    return .init(memory: number, offset: offset)
  }

  /// Runs `body` with a descriptor to give to a peer, read-only unless `writable`; false if there
  /// is none.
  func withDescriptor(writable: Bool, _ body: (Int32) -> Void) -> Bool {
    switch file {
    case .none: return false
    case .some(let file):
      if writable {
        body(file.descriptor.rawValue)
        return true
      }
      do throws(Errno) {
        let reader = try file.readOnlyDescriptor()
        body(reader.rawValue)
        return true
      } catch {
        if !hasComplained.exchange(true, ordering: .relaxed) {
          Log.warning(
            "shared memory: no descriptor that only reads: \(error); a peer does not map "
              + "\(mapping.count) bytes, but copies through the kernel or over TCP")
        }
        return false
      }
    }
  }
}

extension TransferEngine {
  /// Makes a range a buffer of the local segment. The caller keeps owning the memory and must keep
  /// it mapped until it is unregistered.
  public func register(
    _ address: UnsafeMutableRawPointer, length: UInt64, location: String = "*", access: Access
  ) throws(MooncakeError) {
    let range = (address: UInt64(UInt(bitPattern: address)), length: length)
    try withUnsafePointer(to: range) { pointer throws(MooncakeError) in
      try register(
        UnsafeBufferPointer(start: pointer, count: 1), location: location, access: access)
    }
  }

  /// Registers all ranges or none.
  package func register(
    _ ranges: UnsafeBufferPointer<(address: UInt64, length: UInt64)>, location: String,
    access: Access
  ) throws(MooncakeError) {
    try addBuffers(Array(ranges), location: location, access: access)
    if access == .local { return }
    let call = Call(until: deadline(0))
    do throws(MooncakeError) {
      try publishChanges(call)
    } catch {
      var message =
        "registering \(ranges.count) buffer(s), all undone: \(error.message)"
      let starts = ranges.map(\.address)
      do throws(MooncakeError) {
        try withdraw(local.buffers.remove(starts), Set(starts), call)
      } catch {
        message += "; \(error.message)"
      }
      throw MooncakeError(error.code, message)
    }
  }

  /// Makes ranges buffers of the local segment, all or none. Only after `publishChanges` are they
  /// in the metadata service.
  package func addBuffers(
    _ ranges: [(address: UInt64, length: UInt64)], location: String, access: Access
  ) throws(MooncakeError) {
    try checkOpen()
    if location.utf8.count > 4096 {
      throw MooncakeError(.invalidArgument, "the location name is longer than 4096 bytes")
    }
    if !access.isSubset(of: [.remoteRead, .remoteWrite]) {
      throw MooncakeError(.invalidArgument, "access \(access.rawValue) has unknown bits")
    }
    let new = ranges.map {
      BufferTable.Buffer(
        range: RemoteBuffer(address: $0.address, length: $0.length, access: access),
        location: location, place: place($0.address, $0.length))
    }
    try local.buffers.insert(new)
    for transport in transports.all { transport.offer(new) }
  }

  /// Ends peers' access to removed buffers and unpublishes them. What the metadata service refuses
  /// is retried; a peer that still finds a buffer there is refused here. Throws BUSY if a peer's
  /// copy does not end within the call; `starts` are then recorded as unfinished.
  private func withdraw(
    _ removed: [BufferTable.Buffer], _ starts: Set<UInt64>, _ call: Call
  ) throws(MooncakeError) {
    if starts.isEmpty { return }
    var late: String?
    for transport in transports.all { late = transport.revoke(removed, until: call) ?? late }
    if removed.contains(where: { $0.range.access != .local }) {
      try? publishChanges(call)
    }
    unfinished.withLock {
      if late == nil { $0.subtract(starts) } else { $0.formUnion(starts) }
    }
    if let late { throw stillCopied(by: late) }
  }

  /// Ends the registration that begins at `address`. No peer touches the memory after this returns.
  public func unregister(_ address: UnsafeMutableRawPointer) throws(MooncakeError) {
    let value = UInt64(UInt(bitPattern: address))
    try withUnsafePointer(to: value) { pointer throws(MooncakeError) in
      try unregister(UnsafeBufferPointer(start: pointer, count: 1))
    }
  }

  /// Unregisters every address that is registered; throws for the first that is not.
  package func unregister(
    _ addresses: UnsafeBufferPointer<UInt64>
  ) throws(MooncakeError) {
    try removeBuffers(Array(addresses), nil)
  }

  /// As above. The call bounds the wait for peers in the middle of a copy, and then for the
  /// metadata service; nil means the default timeout.
  package func removeBuffers(
    _ addresses: [UInt64], _ call: Call?
  ) throws(MooncakeError) {
    try checkOpen()
    let removed = local.buffers.remove(addresses)
    var found = Set(removed.map(\.range.address))
    // Buffers of an earlier call that gave up waiting; they are no longer offered to peers.
    found.formUnion(unfinished.withLock { $0.intersection(addresses) })
    try withdraw(removed, found, call ?? Call(until: deadline(0)))
    for address in addresses where !found.contains(address) {
      throw MooncakeError(
        .notRegistered, "no registered buffer begins at 0x\(String(address, radix: 16))")
    }
  }

  private func stillCopied(by late: String) -> MooncakeError {
    let message =
      "unregister: \(late) is in the middle of a copy that does not end and may still touch the "
      + "memory, which is no longer offered to anybody: keep it, and call again when that thread "
      + "goes on or has ended"
    Log.error(message)
    return MooncakeError(.busy, message)
  }

  /// Allocates zeroed, page-aligned, registered memory that the engine owns, near NUMA node N if
  /// the location is "cpu:N".
  public func allocate(
    length: UInt64, location: String = "*", access: Access
  ) throws(MooncakeError) -> UnsafeMutableRawPointer {
    // Listed before the registration, which looks up where the range lies.
    let address = try allocate(length: length, location: location)
    do throws(MooncakeError) {
      let range = (address: UInt64(UInt(bitPattern: address)), length: length)
      try withUnsafePointer(to: range) { pointer throws(MooncakeError) in
        try register(
          UnsafeBufferPointer(start: pointer, count: 1), location: location, access: access)
      }
    } catch {
      let key = UInt64(UInt(bitPattern: address))
      // Keep it mapped while a peer may touch it.
      if !unfinished.withLock({ $0.contains(key) }),
        let memory = mappings.withLock({ $0.removeValue(forKey: key) })
      {
        release(memory)
      }
      throw error
    }
    return address
  }

  /// Allocates memory as above without registering it; the caller registers and finally frees it.
  package func allocate(
    length: UInt64, location: String
  ) throws(MooncakeError) -> UnsafeMutableRawPointer {
    try checkOpen()
    guard length > 0, length <= UInt64(Int.max) else {
      throw MooncakeError(.invalidArgument, "cannot allocate \(length) bytes")
    }
    let memory: EngineMemory
    let node = location.hasPrefix("cpu:") ? UInt32(location.dropFirst(4)) : nil
    if let shared = mappable?.allocate(byteCount: Int(length), node: node) {
      memory = shared
    } else {
      do throws(Errno) { memory = try EngineMemory(byteCount: Int(length), node: node) } catch {
        throw MooncakeError(.outOfMemory, "allocating \(length) bytes: \(error)")
      }
    }
    let address = memory.mapping.address
    mappings.withLock { $0[UInt64(UInt(bitPattern: address))] = memory }
    return address
  }

  /// Where memory that peers can map comes from.
  private var mappable: (any MappableMemory)? {
    for transport in transports.all { if let memory = transport.memory { return memory } }
    return nil
  }

  private func release(_ memory: EngineMemory) { mappable?.release(memory) }

  private func place(_ address: UInt64, _ length: UInt64) -> BufferTable.SharedPlace? {
    if mappable == nil { return nil }
    return mappings.withLock { mappings in
      for memory in mappings.values {
        if let place = memory.place(address, length) { return place }
      }
      return nil
    }
  }

  /// Unregisters and frees memory of `allocate`.
  public func free(_ address: UnsafeMutableRawPointer) throws(MooncakeError) {
    try free(address, publishing: nil)
  }

  /// As above; `publishing` bounds the wait for peers in the middle of a copy and for the metadata
  /// service.
  package func free(
    _ address: UnsafeMutableRawPointer, publishing: Call?
  ) throws(MooncakeError) {
    try checkOpen()
    let key = UInt64(UInt(bitPattern: address))
    guard let memory = mappings.withLock({ $0.removeValue(forKey: key) }) else {
      throw MooncakeError(
        .notRegistered, "0x\(String(key, radix: 16)) was not allocated by this engine")
    }
    // Parts of it may have been registered again.
    let end = key + UInt64(memory.mapping.count)
    let parts = local.buffers.snapshot.buffers.map(\.address) + unfinished.withLock { $0 }
    let others = parts.filter { $0 > key && $0 < end }
    do throws(MooncakeError) {
      try removeBuffers([key] + others, publishing)
    } catch {
      if error.code == .busy {
        // Keep it mapped while a peer may touch it.
        mappings.withLock { $0[key] = memory }
      } else {
        release(memory)
      }
      throw error
    }
    release(memory)
  }
}
