import Glibc
import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Commands whose answer is lost with the connection, so that it is unknown whether they were
/// executed.
@Suite(.serialized)
struct RedisServiceTests {
  /// A Redis with the commands that the store needs.
  private final class Redis: Sendable {
    struct State: Sendable {
      var values: [String: String] = [:]
      var commands: [String] = []
      /// Ends the connection instead of answering this command.
      var lostAnswer: String?
      /// ... or before it is executed.
      var lostCommand: String?
      /// Puts this before it executes a repeated command.
      var interloper: (key: String, value: String)?

      /// nil: the connection ends.
      mutating func answer(_ words: [String]) -> String? {
        commands.append(words[0])
        let isLost = words[0] == lostCommand
        if isLost {
          lostCommand = nil
          if let interloper { values[interloper.key] = interloper.value }
          return nil
        }
        let text = carryOut(words)
        if words[0] != lostAnswer { return text }
        lostAnswer = nil
        if let interloper { values[interloper.key] = interloper.value }
        return nil
      }

      private mutating func carryOut(_ words: [String]) -> String {
        switch words[0] {
        case "GET": return values[words[1]].map(Self.text) ?? "$-1\r\n"
        case "SET":
          if words.last == "NX" && values[words[1]] != nil { return "$-1\r\n" }
          values[words[1]] = words[2]
          return "+OK\r\n"
        case "DEL": return ":\(values.removeValue(forKey: words[1]) == nil ? 0 : 1)\r\n"
        // The only script: the one that deletes.
        case "EVAL":
          if values[words[3]] != words[4] { return ":0\r\n" }
          values[words[3]] = nil
          return ":1\r\n"
        default: return "-ERR unknown command `\(words[0])`\r\n"
        }
      }

      private static func text(_ text: String) -> String {
        "$\(text.utf8.count)\r\n\(text)\r\n"
      }
    }

    let state = Lock(State())

    func withState<Result: Sendable>(_ body: (inout State) -> Result) -> Result {
      state.withLock { body(&$0) }
    }

    /// Every other line of a command is the length of the next one.
    func answer(_ request: ScriptedServer.Request) -> ScriptedServer.Reply {
      let lines = request.text.split(separator: "\r\n", omittingEmptySubsequences: false)
      let words = stride(from: 2, to: lines.count, by: 2).map { String(lines[$0]) }
      return withState { $0.answer(words) }.map { .text($0) } ?? .close
    }
  }

  private var call: Call { Call(until: .after(milliseconds: 10_000)) }
  private let redis = Redis()
  private let server: ScriptedServer
  private let store: any MetadataService
  private let entry = MetadataEntry(key: "mooncake/x", value: "mine")

  init() throws {
    let redis = self.redis
    server = try ScriptedServer { redis.answer($0) }
    store = try MetadataServices.open(
      MetadataURI(parsing: "redis://127.0.0.1:\(server.port)"), settings: MetadataSettings())
    // From here on there is an idle connection, which may have been closed.
    #expect(try store.get("none", call) == nil)
  }

  @Test func ownPutsAreKnownWhenTheirAnswerIsLost() throws {
    redis.withState { $0.lostAnswer = "SET" }
    #expect(try store.putIfAbsent(entry, lease: nil, call))
    #expect(redis.withState { $0.commands.filter { $0 == "SET" }.count } == 2)
    #expect(try store.get(entry.key, call) == "mine")
    server.stop()
  }

  @Test func anothersPutsAreNotTakenForOwnOnes() throws {
    redis.withState {
      $0.lostCommand = "SET"
      $0.interloper = (entry.key, "another's")
    }
    #expect(try !store.putIfAbsent(entry, lease: nil, call))
    #expect(try store.get(entry.key, call) == "another's")
    server.stop()
  }

  @Test(arguments: [false, true])
  func deletionsThatAreRepeatedSpareWhatCameInBetween(isCarriedOut: Bool) throws {
    try store.put(entry, lease: nil, call)
    redis.withState {
      if isCarriedOut { $0.lostAnswer = "EVAL" } else { $0.lostCommand = "EVAL" }
      $0.interloper = (entry.key, "newer")
    }
    try store.revoke(MetadataLease(id: 0, ttlMilliseconds: 1000), [entry], call)
    #expect(redis.withState { $0.commands.filter { $0 == "EVAL" }.count } == 2)
    #expect(try store.get(entry.key, call) == "newer")
    server.stop()
  }
}
