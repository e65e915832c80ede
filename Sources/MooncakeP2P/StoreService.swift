import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// The messages between stores of different processes.
package enum StoreService {
  package static let name = "store"

  package typealias Completion<Value> = @Sendable (Result<Value, MooncakeError>) -> Void

  /// Asks a holder for permission to read; `completion` is called by the deadline and must not
  /// wait.
  package static func ask(
    _ engine: TransferEngine, _ holder: HolderAddress, _ request: ShardRequest,
    until deadline: Deadline, _ completion: @escaping Completion<ShardAnswer>
  ) {
    engine.callService(at: holder.rpc, request.json, until: deadline) { result in
      completion(
        result.flatMap { text in
          do throws(MooncakeError) {
            return .success(try answer(text, shardCount: request.have.count))
          } catch {
            return .failure(error)
          }
        })
    }
  }

  /// Tells a holder that nothing is read from it any more; does not wait for an answer.
  package static func tell(
    _ engine: TransferEngine, _ holder: HolderAddress, _ request: ShardRequest
  ) {
    ask(engine, holder, request, until: .after(milliseconds: 500)) { _ in }
  }

  private static func answer(
    _ text: String, shardCount: Int
  ) throws(MooncakeError) -> ShardAnswer {
    // The holder's process lives, but its store is gone.
    if text == RPCAnswer.noService { return ShardAnswer(state: .gone) }
    return try ShardAnswer(json: text, shardCount: shardCount)
  }

  /// Answers a call that is meant for one of these holdings; nil if it is for none.
  package static func answer(
    _ call: JSONValue, holding find: (UInt64) -> Holding?
  ) -> String? {
    guard call["service"]?.string == name else { return nil }
    if let refusal = StoreVersion.refusal(of: call) { return refusal }
    guard let number = call["holding"]?.string.flatMap({ HexNumber.parse($0) }),
      let holding = find(number)
    else { return nil }
    switch call["op"]?.string {
    case "open": return holding.answerOpen()
    case "ask":
      do throws(MooncakeError) {
        let shardCount = holding.manifest.layout.shardCount
        return holding.answer(try ShardRequest(json: call, shardCount: shardCount)).json
      } catch {
        return StoreVersion.refusal(error.message)
      }
    default: return StoreVersion.refusal("unknown operation")
    }
  }
}
