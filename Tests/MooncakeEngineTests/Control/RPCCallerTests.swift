import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

@Suite struct RPCCallerTests {
  private final class Answers: Sendable {
    private let results = Lock<[Result<String, MooncakeError>]>([])

    func add(_ result: Result<String, MooncakeError>) { results.withLock { $0.append(result) } }

    func wait(for count: Int) -> [Result<String, MooncakeError>] {
      let end = Deadline.after(milliseconds: 8000)
      while results.withLock({ $0.count }) < count && !end.hasPassed {
        sleepBriefly(nanoseconds: 1_000_000)
      }
      return results.withLock { $0 }
    }
  }

  /// However close together they are.
  @Test func everyTimerRuns() throws {
    let caller = RPCCaller()
    defer { caller.stop() }
    let count = 2000
    let ran = Atomic(0)
    let start = Clock.now() + 300_000_000
    for index in 0..<count {
      caller.run(at: Deadline(nanoseconds: start + UInt64(index) * 20_000)) {
        ran.wrappingAdd(1, ordering: .relaxed)
      }
    }
    #expect(eventually(within: 20_000) { ran.load(ordering: .relaxed) == count })
    #expect(ran.load(ordering: .relaxed) == count)
  }

  private func server(_ change: (inout RPCServer.Limits) -> Void = { _ in }) throws -> RPCServer {
    var limits = RPCServer.Limits()
    change(&limits)
    return try RPCServer(
      listener: Socket.listening(on: SocketAddress(numeric: "127.0.0.1", port: 0)!),
      handlers: RPCServer.Handlers(
        descriptor: { nil }, notify: { _ in nil },
        service: { "{\"echo\":\($0["number"]?.unsigned ?? 0)}" }), limits: limits)
  }

  private func ask(
    _ caller: RPCCaller, _ address: SocketAddress, _ number: Int = 0,
    milliseconds: UInt64 = 4000, _ answers: Answers
  ) {
    caller.call(
      HostPort(host: "127.0.0.1", port: address.port), at: [address], "{\"number\":\(number)}",
      until: .after(milliseconds: milliseconds)
    ) { answers.add($0) }
  }

  @Test func aConnectionIsKeptForTheNextQuestion() throws {
    let (server, caller, answers) = (try server(), RPCCaller(), Answers())
    defer { caller.stop() }
    for number in 1...5 {
      ask(caller, server.address, number, answers)
      let all = answers.wait(for: number)
      #expect(try all.last?.get() == "{\"echo\":\(number)}")
    }
    #expect(server.counters.acceptedConnections == 1)
    #expect(server.counters.serviceRequests == 5)
    // Concurrent calls need a connection each.
    for number in 6...20 { ask(caller, server.address, number, answers) }
    #expect(answers.wait(for: 20).count { (try? $0.get()) != nil } == 20)
  }

  @Test func whatThePeerHasClosedIsOpenedAgain() throws {
    let server = try server { $0.idleMilliseconds = 100 }
    let (caller, answers) = (RPCCaller(), Answers())
    defer { caller.stop() }
    for number in 1...3 {
      ask(caller, server.address, number, answers)
      #expect(try answers.wait(for: number).last?.get() == "{\"echo\":\(number)}")
      sleepBriefly(nanoseconds: 250_000_000)
    }
    #expect(server.counters.acceptedConnections == 3)
    #expect(server.counters.rejectedConnections == 0)
  }

  @Test func restingConnectionsAreBounded() throws {
    let server = try server { $0.restingCount = 2 }
    let callers = (0..<6).map { _ in RPCCaller() }
    defer { for caller in callers { caller.stop() } }
    let answers = Answers()
    for caller in callers { ask(caller, server.address, 0, answers) }
    #expect(answers.wait(for: 6).count { (try? $0.get()) != nil } == 6)
    let end = Deadline.after(milliseconds: 4000)
    while server.counters.openConnections > 2 && !end.hasPassed {
      sleepBriefly(nanoseconds: 5_000_000)
    }
    #expect(server.counters.openConnections <= 2)
  }

  @Test func silentPeersKeepNobodyFromBeingAsked() throws {
    let (server, caller) = (try server(), RPCCaller())
    defer { caller.stop() }
    let silent = try Socket.listening(on: SocketAddress(numeric: "127.0.0.1", port: 0)!)
    let (late, good) = (Answers(), Answers())
    for _ in 0..<100 {
      ask(caller, try silent.localAddress(), milliseconds: 1500, late)
    }
    let begin = Clock.now()
    ask(caller, server.address, 7, good)
    #expect(try good.wait(for: 1).first?.get() == "{\"echo\":7}")
    #expect(Clock.now() - begin < 1_000_000_000)
    let failures = late.wait(for: 100)
    #expect(failures.count == 100)
    for failure in failures {
      guard case .failure(let error) = failure else { continue }
      #expect(error.code == .timeout)
    }
  }

  /// The first of a peer's addresses drops packets.
  @Test func anAddressThatAnswersNothingLeavesTimeForTheNext() throws {
    let (server, caller, answers) = (try server(), RPCCaller(), Answers())
    defer { caller.stop() }
    let listener = try Socket.listening(
      on: SocketAddress(numeric: "127.0.0.1", port: 0)!, backlog: 0)
    let fillers = try fill(listener.localAddress())
    let addresses = [try listener.localAddress(), server.address]
    let begin = Clock.now()
    caller.call(
      HostPort(host: "peer", port: 1), at: addresses[...], "{\"number\":9}",
      until: .after(milliseconds: 3000)
    ) { answers.add($0) }
    let answer = try #require(answers.wait(for: 1).first)
    #expect(try answer.get() == "{\"echo\":9}")
    #expect(Clock.now() - begin < 2_900_000_000)
    // With one address the deadline is the limit.
    ask(caller, addresses[0], milliseconds: 300, answers)
    guard case .failure(let error) = try #require(answers.wait(for: 2).last) else { return }
    #expect(error.code == .timeout)
    withExtendedLifetime(fillers) {}
    _ = consume listener
  }

  /// Fills a listener's queue, which then drops further connects.
  private func fill(_ address: SocketAddress) throws -> [FakeConnection] {
    let fillers = try (0..<4).map { index in
      let socket = try Socket(family: address.family)
      try socket.startConnect(to: address)
      return FakeConnection(socket, index: index)
    }
    sleepBriefly(nanoseconds: 20_000_000)
    return fillers
  }

  @Test func theEndEndsEveryQuestion() throws {
    let (caller, answers) = (RPCCaller(), Answers())
    let silent = try Socket.listening(on: SocketAddress(numeric: "127.0.0.1", port: 0)!)
    let address = try silent.localAddress()
    for _ in 0..<5 { ask(caller, address, milliseconds: 60_000, answers) }
    caller.stop()
    ask(caller, address, 0, answers)
    let results = answers.wait(for: 6)
    #expect(results.count == 6)
    for result in results {
      guard case .failure(let error) = result else { continue }
      #expect(error.code == .canceled)
    }
  }
}
