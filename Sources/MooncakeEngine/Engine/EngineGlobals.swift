import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// Process-wide state of this module and those below.
package enum EngineGlobals {
  private static let isPrepared = Atomic(false)

  /// Uses each global once: see `Fork.prepare`.
  package static func prepare() { Fork.prepare(isPrepared) { use() } }

  /// As `prepare`, for callers already inside `Fork.prepare`.
  package static func use() {
    MetadataGlobals.use()
    TransportRegistry.prepare()
    _ = Notification.byteLimit
    _ = (Access.local, Access.remoteRead, Access.remoteWrite)
  }
}
