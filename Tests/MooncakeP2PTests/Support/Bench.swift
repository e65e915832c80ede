import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Synchronization

/// Processes on a scripted service, in virtual time.
final class Bench: Sendable {
  private let time = Atomic<UInt64>(1_000_000_000_000)
  private let cut = Lock<Set<Int>>([])
  private let interruption = Lock<Interruption?>(nil)

  private struct Interruption: Sendable {
    let client: Int
    var callsLeft: Int
    let body: @Sendable () -> ScriptedService.Fate
  }

  var now: UInt64 { time.load(ordering: .relaxed) }

  /// Lets time pass, during which these processes do their rounds.
  func pass(milliseconds: UInt64, _ keepers: RecordKeeper...) throws {
    for _ in 0..<4 {
      time.wrappingAdd(milliseconds * 250_000, ordering: .relaxed)
      for keeper in keepers { _ = try keeper.step() }
    }
  }

  func directory(_ service: ScriptedService, _ client: Int = 0) -> StoreDirectory {
    StoreDirectory(
      ScriptedStore(service) { [self] in
        interrupted(client) ?? (cut.withLock { $0.contains(client) } ? .unreachable : .done)
      },
      prefix: "mooncake/", ttlMilliseconds: 2000, now: { [self] in now },
      wallMilliseconds: { [self] in now / 1_000_000 })
  }

  /// A process that withdraws removed payloads.
  func keeper(_ service: ScriptedService, _ client: Int) throws -> RecordKeeper {
    let keeper = try RecordKeeper(directory(service, client), hasThread: false)
    keeper.onRemoval { [unowned keeper] in keeper.remove($0, testCall) }
    return keeper
  }

  func service() -> ScriptedService { ScriptedService { [self] in now } }

  func setCut(_ client: Int, _ isCut: Bool) {
    cut.withLock { if isCut { $0.insert(client) } else { $0.remove(client) } }
  }

  /// Runs `body` before a later call of a process; `body` decides what becomes of the call.
  func interrupt(
    _ client: Int, afterCalls count: Int, _ body: @escaping @Sendable () -> ScriptedService.Fate
  ) {
    interruption.withLock {
      $0 = Interruption(client: client, callsLeft: count, body: body)
    }
  }

  /// Cancels it; returns whether it has happened.
  func endInterruption() -> Bool {
    interruption.withLock { present in
      defer { present = nil }
      return present == nil
    }
  }

  private func interrupted(_ client: Int) -> ScriptedService.Fate? {
    let body: (@Sendable () -> ScriptedService.Fate)? = interruption.withLock { present in
      guard let found = present, found.client == client else { return nil }
      present?.callsLeft -= 1
      if found.callsLeft > 0 { return nil }
      present = nil
      return found.body
    }
    return body?()
  }
}
