import MooncakeTestSupport
import Testing

/// One engine and 256 others: their cost, and that all get their share.
@Suite(.serialized)
struct ManyPeersTests {
  /// Sanitizers multiply memory and time.
  static let processCount = Sanitizer.isAny ? 4 : 8
  static let enginesPerProcess = Sanitizer.isAny ? 8 : 32
  static let blockBytes = 256 << 10

  /// Many peers in few processes, and an initiator in its own.
  private struct Crowd {
    var peers: [PeerProcess] = []
    let initiator: PeerProcess
    let threads: Int
    let descriptors: Int
    let residentKiB: Int

    init(_ kind: TransportKind, _ operation: String) throws {
      let transport = kind == .tcp ? "tcp" : "shm"
      initiator = try PeerProcess(["crowd", transport, operation, String(blockBytes)])
      for _ in 0..<processCount {
        let peer = try PeerProcess(["many", String(enginesPerProcess), String(2 * blockBytes)])
        for _ in 0..<enginesPerProcess { initiator.tell(try peer.readLine(within: 60_000)) }
        peers.append(peer)
      }
      initiator.tell()
      let words = try initiator.readLine(within: 60_000).split(separator: " ").map { Int($0) }
      try #require(words.count == 4)
      threads = try #require(words[1])
      descriptors = try #require(words[2])
      residentKiB = try #require(words[3])
    }

    /// The bytes that each peer moves, process by process.
    func move(milliseconds: Int) throws -> [Int] {
      initiator.tell(String(milliseconds))
      let line = try initiator.readLine(within: 60_000)
      return line.split(separator: " ").compactMap { Int($0) }
    }
  }

  @Test(arguments: TransportKind.inCrowds)
  func threadsAndDescriptorsStayFew(_ kind: TransportKind) throws {
    let crowd = try Crowd(kind, "read")
    let count = Self.processCount * Self.enginesPerProcess
    // Workers and callbacks; no thread belongs to a peer.
    #expect(crowd.threads <= 10)
    #expect(crowd.descriptors <= 4 * count + 16)
    if !Sanitizer.isAny { #expect(crowd.residentKiB <= 256 * count) }
  }

  @Test(arguments: ["read", "write"])
  func allGetTheirShare(_ operation: String) throws {
    let crowd = try Crowd(.tcp, operation)
    _ = try crowd.move(milliseconds: 300)
    let moved = try crowd.move(milliseconds: 3000)
    let least = try #require(moved.min())
    let most = try #require(moved.max())
    #expect(least > 0)
    // Whole batches are counted, so a difference of one is fair.
    #expect(most <= 2 * least + 4 * Self.blockBytes, "\(least) to \(most) bytes")
  }

  @Test(arguments: ["read", "write"])
  func deadPeersSlowNoOther(_ operation: String) throws {
    let crowd = try Crowd(.tcp, operation)
    _ = try crowd.move(milliseconds: 300)
    let living = 2 * Self.enginesPerProcess
    let before = try crowd.move(milliseconds: 2000).dropFirst(living).reduce(0, +)
    crowd.peers[0].kill()
    crowd.peers[1].stop()
    let after = try crowd.move(milliseconds: 2000)
    crowd.peers[1].resume()
    #expect(after.prefix(Self.enginesPerProcess).allSatisfy { $0 == 0 })
    // They gain what the dead ones had. The bound allows for a busy machine.
    let rest = after.dropFirst(living).reduce(0, +)
    #expect(Double(rest) >= 0.7 * Double(before), "\(before) bytes before, \(rest) after")
  }
}
