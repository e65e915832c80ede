import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

@Suite(.serialized) struct RPCClientTests {
  private func failure(_ body: () throws(MooncakeError) -> Void) -> MooncakeError? {
    do throws(MooncakeError) {
      try body()
      return nil
    } catch {
      return error
    }
  }

  /// A peer that answers one connection with fixed bytes, then closes it.
  private func makePeer(
    answering bytes: [UInt8], reads: Bool = true
  ) throws -> (String, WorkerThread) {
    let listener = try makeListener()
    let name = try listener.localAddress().description
    let descriptor = dup(listener.rawValue)
    let thread = try WorkerThread.start(name: "peer") {
      let listener = Socket(owning: FileDescriptor(owning: descriptor))
      try? listener.wait(for: POLLIN, until: .after(milliseconds: 5000))
      guard let socket = try? listener.accept() else { return }
      if reads {
        try? socket.wait(for: POLLIN, until: .after(milliseconds: 5000))
        var scratch = [UInt8](repeating: 0, count: 4096)
        _ = scratch.withUnsafeMutableBytes { recv(socket.rawValue, $0.baseAddress, $0.count, 0) }
      }
      var sent = 0
      while sent < bytes.count {
        guard let count = try? socket.trySend(bytes, from: sent) else { break }
        sent += count
      }
      usleep(20_000)
    }
    return (name, thread)
  }

  @Test(arguments: ["127.0.0.1", "::1"])
  func fetchNotifyProbe(host: String) throws {
    let queue = NotificationQueue()
    let descriptor = SegmentDescriptor(
      name: "n:1", tcpDataPort: 7,
      buffers: [RemoteBuffer(address: 4096, length: 1, access: .remoteRead)])
    let server = try makeServer(host: host, queue: queue, descriptor: descriptor.json())
    let call = Call(until: .after(milliseconds: 5000))
    #expect(try RPCClient.fetchDescriptor(of: server.name, own: "{}", call) == descriptor)
    let message = Notification(name: "a \"b\"", message: "line\n2 é")
    try RPCClient.notify(server.name, message, call)
    #expect(queue.takeAll() == [message])
    try RPCClient.probe(server.name, call)
    server.stop()
  }

  @Test func nameGoesThroughTheResolver() throws {
    let server = try makeServer()
    // "localhost" may resolve to ::1 first, where nobody listens: the next address is tried.
    try RPCClient.probe(
      "localhost:\(server.address.port)", Call(until: .after(milliseconds: 5000)))
    server.stop()
  }

  @Test func nameWithoutPortGetsTheDefault() throws {
    let server = try makeServer()
    var settings = HandshakeSettings()
    settings.defaultPort = server.address.port
    try RPCClient.probe("127.0.0.1", settings: settings, Call(until: .after(milliseconds: 5000)))
    server.stop()
  }

  @Test func peerWithoutSegmentIsNotFound() throws {
    let server = try makeServer(descriptor: nil)
    let error = failure { () throws(MooncakeError) in
      _ = try RPCClient.fetchDescriptor(
        of: server.name, own: "{}", Call(until: .after(milliseconds: 5000)))
    }
    #expect(error?.code == .notFound)
    #expect(error?.message.contains(server.name) == true)
    server.stop()
  }

  @Test func refusedFailsAtOnce() throws {
    let name = try makeListener().localAddress().description
    let start = Clock.now()
    let error = failure { () throws(MooncakeError) in
      try RPCClient.probe(name, Call(until: .after(milliseconds: 10_000)))
    }
    #expect(error?.code == .unreachable)
    #expect(error?.message.hasPrefix("peer \(name): connect refused (probe RPC)") == true)
    #expect(Clock.now() - start < 2_000_000_000)
  }

  @Test func peerThatAcceptsAndSaysNothing() throws {
    let listener = try makeListener()
    let name = try listener.localAddress().description
    let start = Clock.now()
    let error = failure { () throws(MooncakeError) in
      try RPCClient.probe(name, Call(until: .after(milliseconds: 200)))
    }
    #expect(error?.code == .timeout)
    #expect(error?.message.contains("the answer was awaited") == true)
    #expect((200_000_000..<2_000_000_000).contains(Clock.now() - start))
    _ = consume listener
  }

  @Test func peerThatTakesNothingWhileALongRequestIsSent() throws {
    let listener = try makeListener()
    let port = try listener.localAddress().port
    var settings = HandshakeSettings()
    settings.maximumLength = 128 << 20
    let error = failure { () throws(MooncakeError) in
      _ = try RPCClient.ask(
        HostPort(host: "127.0.0.1", port: port), type: .notify,
        body: String(repeating: " ", count: 64 << 20), settings: settings,
        Call(until: .after(milliseconds: 300)))
    }
    #expect(error?.code == .timeout)
    _ = consume listener
  }

  @Test func unansweredConnectEndsAtTheDeadline() throws {
    // A listener with a full queue drops further connects.
    let listener = try Socket.listening(
      on: SocketAddress(numeric: "127.0.0.1", port: 0)!, backlog: 0)
    let address = try listener.localAddress()
    let fillers = UnsafeMutableBufferPointer<Socket>.allocate(capacity: 4)
    defer {
      for index in fillers.indices { fillers.deinitializeElement(at: index) }
      fillers.deallocate()
    }
    for index in fillers.indices {
      let socket = try Socket(family: AF_INET)
      try socket.startConnect(to: address)
      fillers.initializeElement(at: index, to: socket)
    }
    usleep(20_000)
    let start = Clock.now()
    let error = failure { () throws(MooncakeError) in
      try RPCClient.probe(address.description, Call(until: .after(milliseconds: 300)))
    }
    #expect(error?.code == .timeout)
    #expect(Clock.now() - start < 3_000_000_000)
    _ = consume listener
  }

  @Test(
    arguments: [
      ([], .unreachable),
      ([2, 0, 0, 0], .unreachable),
      ([3, 0, 0, 0, 0, 0, 0, 0, 3, 0x7B], .unreachable),
      ([0, 0, 0, 0, 0, 0, 0, 0], .protocolViolation),
      ([0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF], .protocolViolation),
      ([0, 0, 0x20, 0, 0, 0, 0, 0], .protocolViolation),
      (Array("HTTP/1.1 400 Bad Request\r\n\r\n".utf8), .protocolViolation),
      (RPCMessage.encoded(type: .notify, body: "{}"), .protocolViolation),
      (RPCMessage.encoded(type: .connection, isOldProtocol: true, body: "{}"), .protocolViolation),
      (RPCMessage.encoded(type: .probe, body: "{"), .protocolViolation),
      ([2, 0, 0, 0, 0, 0, 0, 0, 3, 0xFF], .protocolViolation),
    ] as [([UInt8], MooncakeError.Code)])
  func badAnswers(bytes: [UInt8], code: MooncakeError.Code) throws {
    let (name, thread) = try makePeer(answering: bytes)
    let error = failure { () throws(MooncakeError) in
      try RPCClient.probe(name, Call(until: .after(milliseconds: 5000)))
    }
    #expect(error?.code == code, "\(error?.message ?? "no error")")
    #expect(error?.message.contains(name) == true)
    thread.join()
  }

  /// Sending to a peer that closed at once must not raise SIGPIPE.
  @Test func brokenPipeIsNoSignal() throws {
    let body = String(repeating: " ", count: 16 << 20)
    for _ in 0..<20 {
      let (name, thread) = try makePeer(answering: [], reads: false)
      let peer = try HostPort(parsing: name)
      var settings = HandshakeSettings()
      settings.maximumLength = 128 << 20
      let error = failure { () throws(MooncakeError) in
        _ = try RPCClient.ask(
          peer, type: .notify, body: body, settings: settings,
          Call(until: .after(milliseconds: 5000)))
      }
      #expect(error?.code == .unreachable)
      thread.join()
    }
  }

  @Test(arguments: [
    "", ":", "host:x", "a b:1", "[::1", "127.0.0.1:0", "x\n:1",
    String(repeating: "a", count: 5000),
  ])
  func badNames(name: String) {
    let error = failure { () throws(MooncakeError) in
      try RPCClient.probe(name, Call(until: .after(milliseconds: 1000)))
    }
    #expect(error?.code == .invalidArgument)
    #expect((error?.message.utf8.count ?? 0) < 400)
  }

  @Test func unknownHost() {
    let error = failure { () throws(MooncakeError) in
      try RPCClient.probe("no-such-host.invalid:1", Call(until: .after(milliseconds: 10_000)))
    }
    #expect(error?.code == .unresolved || error?.code == .timeout)
    #expect(error?.message.contains("no-such-host.invalid") == true)
  }

  @Test func tooLongNotificationIsRefusedHere() throws {
    let error = failure { () throws(MooncakeError) in
      try RPCClient.notify(
        "127.0.0.1:1", Notification(name: "", message: String(repeating: "x", count: 1 << 20)),
        settings: HandshakeSettings(), Call(until: .after(milliseconds: 1000)))
    }
    #expect(error?.code == .invalidArgument)
    #expect(error?.message.contains("MC_HANDSHAKE_MAX_LENGTH") == true)
  }

  @Test func tooLongAnswerSaysWhatToRaise() throws {
    let server = try makeServer(descriptor: "\"" + String(repeating: "x", count: 2 << 20) + "\"")
    let error = failure { () throws(MooncakeError) in
      _ = try RPCClient.fetchDescriptor(
        of: server.name, own: "{}", settings: HandshakeSettings(),
        Call(until: .after(milliseconds: 5000)))
    }
    #expect(error?.code == .protocolViolation)
    #expect(error?.message.contains("MC_HANDSHAKE_MAX_LENGTH") == true)
    server.stop()
  }

  /// However long the engine's own descriptor is, it can still ask.
  @Test func longOwnDescriptorIsLeftOut() throws {
    let server = try makeServer()
    let own = "\"" + String(repeating: "x", count: 2 << 20) + "\""
    let descriptor = try RPCClient.fetchDescriptor(
      of: server.name, own: own, settings: HandshakeSettings(),
      Call(until: .after(milliseconds: 5000)))
    #expect(descriptor.name == "peer:1")
    server.stop()
  }

  @Test func passedDeadlineFailsWithoutWaiting() throws {
    let listener = try makeListener()
    let name = try listener.localAddress().description
    let error = failure { () throws(MooncakeError) in
      try RPCClient.probe(name, Call(until: Deadline(nanoseconds: 1)))
    }
    #expect(error?.code == .timeout)
    _ = consume listener
  }

  /// As on an overloaded machine: the answer arrives in time, but the thread that waits for it runs
  /// again only after the deadline.
  @Test func answerReadAfterTheDeadlineCounts() throws {
    signal(SIGUSR1) { _ in _ = sleep(2) }
    var (unblocked, former) = (sigset_t(), sigset_t())
    sigaddset(&unblocked, SIGUSR1)
    pthread_sigmask(SIG_UNBLOCK, &unblocked, &former)
    defer {
      pthread_sigmask(SIG_SETMASK, &former, nil)
      signal(SIGUSR1, SIG_DFL)
    }
    let client = pthread_self()
    let server = try ScriptedServer { _ in
      pthread_kill(client, SIGUSR1)
      return .bytes(RPCMessage.encoded(type: .probe, body: "in time"))
    }
    let deadline = Deadline.after(milliseconds: 1500)
    let answer = try RPCClient.ask(
      HostPort(host: "127.0.0.1", port: server.port), type: .probe, body: "", Call(until: deadline))
    #expect(answer == "in time")
    #expect(deadline.hasPassed)
    server.stop()
  }

  @Test func thousandCallsLeaveNoDescriptor() throws {
    let server = try makeServer()
    try RPCClient.probe(server.name, Call(until: .after(milliseconds: 5000)))
    #expect(eventually { server.counters.openConnections == 0 })
    let before = openDescriptorCount()
    for _ in 0..<1000 {
      try RPCClient.probe(server.name, Call(until: .after(milliseconds: 5000)))
    }
    #expect(eventually { server.counters.openConnections == 0 })
    // Concurrent suites also open descriptors; a leak here would be at least 1000.
    #expect(openDescriptorCount() < before + 200)
    #expect(server.counters.probeRequests == 1001)
    server.stop()
  }

  @Test func manyClientsAtOnce() throws {
    let server = try makeServer()
    let name = server.name
    let threads = try (0..<16).map { _ in
      try WorkerThread.start(name: "client") {
        for _ in 0..<25 {
          do throws(MooncakeError) {
            try RPCClient.probe(name, Call(until: .after(milliseconds: 10_000)))
          } catch {
            Issue.record("\(error)")
          }
        }
      }
    }
    for thread in threads { thread.join() }
    #expect(server.counters.probeRequests == 400)
    server.stop()
  }
}
