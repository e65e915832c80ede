import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// A pair of devices: one of this engine and one of a peer.
package final class CQPath: Path {
  let identity: UInt64
  package let endpoint: CQEndpoint
  /// nil for the engine's own memory.
  private let keys: Lock<RemoteKeys?>

  /// Requests of at least twice as many bytes are cut.
  private static let pieceBytes = 1 << 20

  init(_ endpoint: CQEndpoint, identity: UInt64, keys: RemoteKeys?) {
    self.endpoint = endpoint
    self.identity = identity
    self.keys = Lock(keys)
  }

  package var transportName: String { CQTransport.name }
  package var description: String { endpoint.description }
  package var mark: UInt64 { endpoint.mark }
  package var health: PathHealth { endpoint.health }
  package var gate: WriteGate? { endpoint.gate }
  package var isUsable: Bool { endpoint.health.isInUse }
  package var load: Int { endpoint.load.load(ordering: .relaxed) }
  package var movedBytes: UInt64 { endpoint.moved.load(ordering: .relaxed) }

  package var traits: PathTraits {
    var traits = PathTraits()
    traits.waitsForPeer = true
    traits.waitsForFences = true
    traits.pieceBytes = Self.pieceBytes
    return traits
  }

  /// Connecting takes no time, so nobody else need be kept away meanwhile.
  package func mayProbe(_ now: UInt64) -> Bool { endpoint.health.beginProbe(now, until: now) }

  /// Takes the keys of a newer descriptor.
  func update(_ new: RemoteKeys) {
    keys.withLock { if $0 != nil { $0 = new } }
  }

  package func submit(_ run: inout SliceRun) {
    let keys = self.keys.withLock { $0 }
    var slices = run.takeSlices()
    var accepted = SliceQueue()
    var byteCount = 0
    while let slice = slices.popFirst() {
      let key =
        keys?.find(slice, device: endpoint.peerDevice)
        ?? endpoint.memory.ownKey(
          slice.pointee.remote, UInt64(slice.pointee.length), device: endpoint.peerDevice)
      if key == 0 {
        run.refused.append(slice)
      } else {
        slice.pointee.transportWord = UInt64(key)
        byteCount += slice.pointee.length
        accepted.append(slice)
      }
    }
    if accepted.isEmpty { return }
    endpoint.push(accepted, byteCount: byteCount)
    run.drivers.insert(endpoint.poller.driverBit)
  }

  package func retire(successor: PathSuccessor?) { endpoint.retire(successor) }
}
