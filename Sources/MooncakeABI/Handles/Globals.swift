import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Synchronization

/// Process-wide state.
enum Globals {
  private static let isPrepared = Atomic(false)

  /// Uses each global once, in the first call that needs any: see `Fork.prepare`.
  @inline(__always)
  static func prepare() {
    Fork.prepare(isPrepared) {
      EngineGlobals.use()
      DigestStream.prepare()
      EngineTable.prepare()
      HandleTable.prepare()
      ThreadState.prepare()
      prepareVersion()
      GracefulShutdown.prepare()
    }
  }
}
