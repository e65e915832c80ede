import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// After the last byte of a payload without digests, asks the holders whether they held it until
/// then. A holder that withdrew it in between may have reused the memory, so the bytes may belong
/// to another payload.
struct HoldingCheck {
  let engine: TransferEngine
  let manifest: Manifest
  let reader: UInt64
  let bounds: Bounds

  private static let askMilliseconds: UInt64 = 2000
  /// Limit for a holder that does not answer: as long as a download waits for one.
  private static let patienceMilliseconds: UInt64 = 10_000

  /// Throws unless all of them held it.
  func run(_ holders: Set<HolderAddress>) throws(MooncakeError) {
    for holder in holders { try check(holder) }
  }

  private func check(_ holder: HolderAddress) throws(MooncakeError) {
    let request = ShardRequest.farewell(
      to: holder, version: manifest.version, reader: reader,
      shardCount: manifest.layout.shardCount)
    let patience = Deadline.after(milliseconds: Self.patienceMilliseconds)
    while true {
      let failure: MooncakeError
      do throws(MooncakeError) {
        let deadline = min(bounds.deadline, .after(milliseconds: Self.askMilliseconds))
        let answer = try bounds.wait("asking whether the payload is still held") {
          StoreService.ask(engine, holder, request, until: deadline, $0)
        }
        if answer.state != .gone { return }
        throw MooncakeError(
          .noHolder,
          "holder \(holder.segment) at \(holder.rpc) withdrew the payload while it was read, and "
            + "its memory may hold something else now: get it again")
      } catch {
        failure = error
      }
      if [.noHolder, .canceled, .unsupported].contains(failure.code) { throw failure }
      try bounds.check("asking whether the payload is still held")
      if patience.hasPassed {
        throw MooncakeError(
          .noHolder,
          "holder \(holder.segment) at \(holder.rpc) did not confirm that it held the payload "
            + "until the last byte was read, so the bytes may be others: \(failure.message)")
      }
      bounds.sleep(orReadable: -1)
    }
  }
}
