import MooncakeBase
import MooncakeEngine
import MooncakeSystem

extension P2PStore {
  /// Reads a range of a payload in place, from any holder that has it. The bytes are not verified,
  /// because digests cover whole shards.
  public func read(
    _ name: String, offset: UInt64, into memory: UnsafeMutableRawPointer, length: UInt64,
    _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) {
    try move(.read, name, offset, memory, length, operation)
  }

  /// Writes a range of a payload in place; it must have been registered as writable.
  public func write(
    _ name: String, offset: UInt64, from memory: UnsafeRawPointer, length: UInt64,
    _ operation: StoreOperation = StoreOperation()
  ) throws(MooncakeError) {
    try move(.write, name, offset, UnsafeMutableRawPointer(mutating: memory), length, operation)
  }

  private func move(
    _ opcode: Opcode, _ name: String, _ offset: UInt64, _ memory: UnsafeMutableRawPointer,
    _ length: UInt64, _ operation: StoreOperation
  ) throws(MooncakeError) {
    let verb = opcode == .read ? "reading" : "writing"
    let bounds = bounds(
      operation, "\(verb) payload '\(name)'",
      defaultMilliseconds: engine.defaultTimeoutMilliseconds)
    try PayloadName.check(name)
    if catalog.isClosed { throw MooncakeError(.invalidHandle, "the store was closed") }
    try bounds.check("start")
    guard let target = try locate(name, GetOptions(), bounds) else { throw notFound(name) }
    do throws(MooncakeError) {
      try move(opcode, target, offset, memory, length, bounds)
    } catch {
      throw explained(error, target, bounds)
    }
  }

  private func move(
    _ opcode: Opcode, _ target: Target, _ offset: UInt64, _ memory: UnsafeMutableRawPointer,
    _ length: UInt64, _ bounds: Bounds
  ) throws(MooncakeError) {
    let name = target.name
    let search = try manifest(of: target, bounds)
    let manifest = search.manifest
    let (end, overflow) = offset.addingReportingOverflow(length)
    if overflow || end > manifest.layout.size {
      throw MooncakeError(
        .invalidArgument,
        "payload '\(name)': \(length) bytes at \(offset) are not within its \(manifest.layout.size)"
      )
    }
    if opcode == .write && !manifest.isWritable {
      throw MooncakeError(
        .accessDenied, "payload '\(name)': it was not registered as writable")
    }
    if length == 0 { return }
    var transfer = RangeTransfer(
      engine, workers, manifest, opcode, offset: offset, memory: memory, length: length, bounds)
    try transfer.run(target.holders, after: search)
  }
}
