import MooncakeBase
import MooncakeSystem
import Synchronization

/// What the whole process shares, of this module and below.
package enum MetadataGlobals {
  private static let isPrepared = Atomic(false)

  /// Uses each global once: see `Fork.prepare`.
  package static func prepare() { Fork.prepare(isPrepared) { use() } }

  /// As `prepare`, for code that is inside `Fork.prepare` already.
  package static func use() {
    BaseGlobals.use()
    Checksum.prepare()
  }
}
