import MooncakeBase
import MooncakeEngine
import MooncakeSystem

extension MemoryRoom {
  /// Refuses an allocation that would make the kernel kill this process or another of its control
  /// group.
  static func check(_ byteCount: UInt64, _ what: String) throws(MooncakeError) {
    guard let room = now(), byteCount > room.byteCount else { return }
    throw MooncakeError(
      .outOfMemory,
      "\(what): \(byteCount) bytes of memory are needed, \(room.limit) leaves \(room.byteCount): "
        + "raise it, get into files on a disk, or run elsewhere")
  }
}
