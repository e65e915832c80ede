import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

@Suite(.serialized) struct RPCServerTests {
  @Test func answersEachType() throws {
    let queue = NotificationQueue()
    let server = try makeServer(queue: queue, descriptor: "{\"x\":1}")
    func ask(_ type: RPCType, _ body: String) throws -> String {
      let peer = try RPCTestPeer(to: server.address)
      return try peer.ask(RPCMessage.encoded(type: type, body: body))
    }
    #expect(try ask(.metadata, "{}\n") == "{\"x\":1}")
    #expect(try ask(.probe, "{}") == #"{"status":"success"}"#)
    let taken = try ask(.notify, #"{"name":"n","notify_msg":"m"}"#)
    #expect(taken == #"{"name":"","notify_msg":"success"}"#)
    #expect(queue.takeAll() == [Notification(name: "n", message: "m")])
    let refused = try ask(.notify, #"{"name":7}"#)
    #expect(refused.contains(#""notify_msg":"","mooncake_error":"#))
    #expect(queue.count == 0)
    let counters = server.counters
    #expect(counters.metadataRequests == 1 && counters.probeRequests == 1)
    #expect(counters.notifyRequests == 2 && counters.acceptedConnections == 4)
    server.stop()
  }

  @Test func answerHasTheTypeOfTheRequestAndIsFollowedByTheEnd() throws {
    let server = try makeServer(descriptor: nil)
    for type in RPCType.allCases {
      let peer = try RPCTestPeer(to: server.address)
      try peer.send(RPCMessage.encoded(type: type, body: "{}"))
      let answer = try peer.receiveAll()
      #expect(answer.count > 9)
      #expect(answer[0] == UInt8(answer.count - 8) && answer[8] == type.rawValue)
      if type == .metadata { #expect(Array(answer[9...]) == Array("null".utf8)) }
    }
    server.stop()
  }

  @Test func rejectsConnectionsInExactTypes() throws {
    let server = try makeServer()
    let request = #"""
      {"local_nic_path":"a@mlx5_0","peer_nic_path":"b@mlx5_1","local_lid":0,"local_gid":"",
      "qp_num":[1,2],"ready_ack":false,"reply_msg":"","payload":""}
      """#
    for isOld in [false, true] {
      let peer = try RPCTestPeer(to: server.address)
      try peer.send(
        RPCMessage.encoded(type: .connection, isOldProtocol: isOld, body: request))
      let answer = try peer.receiveAll()
      let text = String(decoding: answer.dropFirst(isOld ? 8 : 9), as: UTF8.self)
      #expect(isOld || answer[8] == 0)
      try JSONDocument(parsing: text).read { root in
        #expect(root["local_nic_path"]?.string == "b@mlx5_1")
        #expect(root["peer_nic_path"]?.string == "a@mlx5_0")
        #expect(root["local_lid"]?.unsigned == 0)
        #expect(root["local_gid"]?.string == "")
        #expect(root["qp_num"]?.isArray == true)
        #expect(root["payload"]?.string == "")
        #expect(root["reply_msg"]?.string == "this engine has no RDMA transport")
        #expect(root["ready_ack"] == nil)
      }
    }
    server.stop()
  }

  private static let garbage: [[UInt8]] = [
    Array("GET / HTTP/1.1\r\nHost: x\r\n\r\n".utf8),
    [UInt8](repeating: 0, count: 64),
    [UInt8](repeating: 0xFF, count: 64),
    [0x01, 0, 0, 0, 0, 0, 0, 0, 1],
    [0x05, 0, 0, 0, 0, 0, 0, 0, 0x80, 1, 2, 3, 4],
    [0x05, 0, 0, 0, 0, 0, 0, 0, 4, 0x7B, 0x7D, 0x20, 0x20],
    [0x03, 0, 0, 0, 0, 0, 0, 0, 1, 0x7B, 0x7B],
    RPCMessage.encoded(type: .notify, body: "{\"name\":\"\u{0}\"}"),
    RPCMessage.encoded(type: .metadata, body: String(repeating: "[", count: 100_000)),
    // One byte more than the limit, and the largest possible length.
    [0x01, 0, 0x10, 0, 0, 0, 0, 0, 1], [UInt8](repeating: 0xFF, count: 8),
  ]

  @Test(arguments: garbage)
  func closesOnGarbageWithoutAnAnswer(bytes: [UInt8]) throws {
    let server = try makeServer()
    let peer = try RPCTestPeer(to: server.address)
    try? peer.send(bytes)
    #expect(try peer.receiveAll().isEmpty)
    #expect(eventually { server.counters.rejectedConnections == 1 })
    try RPCClient.probe(server.name, Call(until: .after(milliseconds: 5000)))
    server.stop()
  }

  @Test func truncatedRequestIsClosed() throws {
    let server = try makeServer()
    let bytes = RPCMessage.encoded(type: .probe, body: "{}")
    for length in 1..<bytes.count {
      let peer = try RPCTestPeer(to: server.address)
      try peer.send(Array(bytes[..<length]))
      peer.socket.shutdownWrite()
      #expect(try peer.receiveAll().isEmpty)
    }
    #expect(eventually { server.counters.rejectedConnections == UInt64(bytes.count - 1) })
    server.stop()
  }

  @Test func requestInSingleBytes() throws {
    let server = try makeServer()
    let peer = try RPCTestPeer(to: server.address)
    peer.socket.setNoDelay()
    for byte in RPCMessage.encoded(type: .probe, body: "{ }") {
      try peer.send([byte])
      usleep(500)
    }
    #expect(String(decoding: try peer.receiveAll().dropFirst(9), as: UTF8.self).contains("success"))
    server.stop()
  }

  @Test func silentAndSlowPeersDelayNobodyAndAreClosed() throws {
    let server = try makeServer { $0.idleMilliseconds = 400 }
    let half = Array(RPCMessage.encoded(type: .probe, body: "{}").prefix(5))
    let peers = UnsafeMutableBufferPointer<RPCTestPeer>.allocate(capacity: 100)
    defer {
      for index in peers.indices { peers.deinitializeElement(at: index) }
      peers.deallocate()
    }
    for index in peers.indices {
      let peer = try RPCTestPeer(to: server.address)
      if index % 2 == 0 { try peer.send(half) }
      peers.initializeElement(at: index, to: peer)
    }
    let start = Clock.now()
    for _ in 0..<50 {
      try RPCClient.probe(server.name, Call(until: .after(milliseconds: 5000)))
    }
    #expect(Clock.now() - start < 2_000_000_000)
    #expect(eventually { server.counters.expiredConnections == 100 })
    #expect(eventually { server.counters.openConnections == 0 })
    for index in peers.indices { #expect(try peers[index].receiveAll().isEmpty) }
    server.stop()
  }

  @Test func progressByTheByteDoesNotHoldAConnection() throws {
    let server = try makeServer {
      $0.idleMilliseconds = 5000
      $0.exchangeMilliseconds = 200
    }
    let peer = try RPCTestPeer(to: server.address)
    try peer.send([0x00, 0x10, 0, 0, 0, 0, 0, 0, 1])
    let deadline = Deadline.after(milliseconds: 5000)
    while !deadline.hasPassed {
      do { try peer.send([0x20]) } catch { break }
      usleep(5000)
    }
    #expect(!deadline.hasPassed)
    #expect(server.counters.expiredConnections == 1)
    server.stop()
  }

  @Test func peerThatReadsButNeverClosesIsClosed() throws {
    let server = try makeServer { $0.idleMilliseconds = 200 }
    let peer = try RPCTestPeer(to: server.address)
    #expect(try peer.ask(RPCMessage.encoded(type: .probe, body: "{}")).contains("success"))
    #expect(eventually { server.counters.openConnections == 0 })
    server.stop()
  }

  @Test func quietestConnectionMakesRoom() throws {
    let server = try makeServer { $0.connectionCount = 2 }
    let first = try RPCTestPeer(to: server.address)
    #expect(eventually { server.counters.openConnections == 1 })
    let second = try RPCTestPeer(to: server.address)
    #expect(eventually { server.counters.openConnections == 2 })
    try first.send([3])
    usleep(50_000)
    try RPCClient.probe(server.name, Call(until: .after(milliseconds: 5000)))
    #expect(try second.receiveAll().isEmpty)
    // The last to make progress is still served.
    try first.send(Array(RPCMessage.encoded(type: .probe, body: "{}").dropFirst()))
    #expect(try first.receiveAll().count > 9)
    server.stop()
  }

  @Test func whoHoldsMostMakesRoom() throws {
    let server = try makeServer { $0.totalByteCount = 1 << 20 }
    defer { server.stop() }
    let unfinished =
      withUnsafeBytes(of: UInt64(900_000).littleEndian) { Array($0) } + [1]
      + [UInt8](repeating: 0x20, count: 400_000)
    let first = try RPCTestPeer(to: server.address)
    try first.send(unfinished)
    let small = try RPCTestPeer(to: server.address)
    try small.send(Array(unfinished.prefix(100)))
    let second = try RPCTestPeer(to: server.address)
    try second.send(unfinished)
    let third = try RPCTestPeer(to: server.address)
    try? third.send(unfinished)
    #expect(eventually { server.counters.rejectedConnections >= 1 })
    let probe = try RPCTestPeer(to: server.address)
    #expect(
      try probe.ask(RPCMessage.encoded(type: .probe, body: "{}")) == #"{"status":"success"}"#)
    // The small one is still there.
    try small.send([0x20])
    #expect(server.counters.openConnections >= 2)
  }

  @Test func largeDescriptorReachesASlowReader() throws {
    let descriptor = "\"" + String(repeating: "x", count: 8 << 20) + "\""
    let server = try makeServer(descriptor: descriptor)
    let peer = try RPCTestPeer(to: server.address)
    try peer.send(RPCMessage.encoded(type: .metadata, body: "{}"))
    usleep(100_000)
    try RPCClient.probe(server.name, Call(until: .after(milliseconds: 5000)))
    #expect(try peer.receiveAll().count == descriptor.utf8.count + 9)
    server.stop()
  }

  @Test func fullQueueIsToldToTheSender() throws {
    let server = try makeServer(queue: NotificationQueue(maximumCount: 1))
    let message = Notification(name: "a", message: "b")
    try RPCClient.notify(server.name, message, Call(until: .after(milliseconds: 5000)))
    do {
      try RPCClient.notify(server.name, message, Call(until: .after(milliseconds: 5000)))
      Issue.record("taken")
    } catch {
      #expect(error.code == .full)
      #expect(error.message.contains("full"))
    }
    server.stop()
  }

  /// Whether a socket of this machine listens on exactly this address. A connect would not tell:
  /// others listen on all addresses, and may have got the port meanwhile.
  private func isListening(_ address: SocketAddress) throws -> Bool {
    let bytes = address.hostBytes.reversed().map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }
    let digits = String(address.port, radix: 16)
    let port = String(repeating: "0", count: 4 - digits.utf8.count) + digits
    let entry = "\(bytes.joined()):\(port)".uppercased()
    let file = try FileDescriptor.open("/proc/self/net/tcp", flags: O_RDONLY)
    var table: [UInt8] = []
    var chunk = [UInt8](repeating: 0, count: 64 << 10)
    while case let count = read(file.rawValue, &chunk, chunk.count), count > 0 {
      table += chunk[..<count]
    }
    return String(decoding: table, as: UTF8.self).split(separator: "\n").contains { line in
      let fields = line.split(separator: " ")
      return fields.count > 3 && fields[1] == entry && fields[3] == "0A"
    }
  }

  @Test func stopClosesEverythingAndFreesThePort() throws {
    let before = openDescriptorCount()
    for round in 0..<200 {
      // Its own address: the freed port may be given to listeners of concurrent suites.
      let server = try makeServer(host: "127.91.7.3")
      let address = server.address
      let peer = try RPCTestPeer(to: address)
      #expect(eventually { server.counters.openConnections == 1 })
      // Seldom, because the system's table takes long to read.
      let isChecked = round % 20 == 0
      #expect(try !isChecked || isListening(address))
      server.stop()
      server.stop()
      #expect(try peer.receiveAll().isEmpty)
      #expect(server.counters.openConnections == 0)
      #expect(try !isChecked || !isListening(address))
    }
    // Concurrent suites also open descriptors; a leak here would be at least 200.
    #expect(openDescriptorCount() < before + 100)
  }

  @Test func stopFromSeveralThreads() throws {
    let server = try makeServer()
    let threads = try (0..<4).map { _ in try WorkerThread.start(name: "stop") { server.stop() } }
    for thread in threads { thread.join() }
    #expect(try !isListening(server.address))
  }

  /// The thread sleeps while nobody is connected.
  @Test func idleUsesNoProcessorTime() throws {
    let thread = Atomic<Int32>(0)
    let server = try RPCServer(
      listener: makeListener(),
      handlers: RPCServer.Handlers(
        descriptor: {
          thread.store(linux_gettid(), ordering: .releasing)
          return nil
        }, notify: { _ in nil }))
    _ = try RPCClient.ask(
      server.hostPort, type: .metadata, body: "{}", Call(until: .after(milliseconds: 5000)))
    #expect(eventually { server.counters.openConnections == 0 })
    usleep(20_000)
    let id = thread.load(ordering: .acquiring)
    let before = try #require(voluntarySwitchCount(ofThread: id))
    usleep(300_000)
    #expect(voluntarySwitchCount(ofThread: id) == before)
    server.stop()
  }
}

/// How often a thread of this process has gone to sleep.
private func voluntarySwitchCount(ofThread id: Int32) -> Int? {
  guard
    let file = try? FileDescriptor.open("/proc/self/task/\(id)/status", flags: O_RDONLY)
  else { return nil }
  var bytes = [UInt8](repeating: 0, count: 8192)
  let count = read(file.rawValue, &bytes, bytes.count)
  guard count > 0 else { return nil }
  return String(decoding: bytes[..<count], as: UTF8.self).split(separator: "\n")
    .first { $0.hasPrefix("voluntary_ctxt_switches:") }
    .flatMap { Int($0.split(separator: "\t").last ?? "") }
}
