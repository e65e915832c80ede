import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Engines that find each other through a server in this process.
struct MetadataDirectoryTests {
  private func start(port: UInt16 = 0) throws -> MetadataServer {
    var options = MetadataServer.Options()
    options.port = port
    return try MetadataServer(options)
  }

  private func engine(_ server: MetadataServer, _ name: String) throws -> TransferEngine {
    try makeEngine {
      $0.metadataURI = server.uri
      $0.name = name
    }
  }

  private func store(_ server: MetadataServer) throws -> any MetadataService {
    try MetadataServices.open(MetadataURI(parsing: server.uri))
  }

  private var call: Call { Call(until: .after(milliseconds: 5000)) }

  @Test func keys() throws {
    #expect(MetadataDirectory.prefix(cluster: "") == "mooncake/")
    #expect(MetadataDirectory.prefix(cluster: "a") == "mooncake/a/")
    #expect(MetadataDirectory.prefix(cluster: "a/") == "mooncake/a/")
    var settings = MetadataSettings()
    settings.clusterID = "c"
    let directory = try MetadataDirectory(
      MetadataURI(parsing: "http://127.0.0.1:1"), settings: settings)
    #expect(directory.segmentKey("host:1") == "mooncake/c/ram/host:1")
    #expect(directory.segmentKey("nvmeof/pool") == "mooncake/c/nvmeof/pool")
    #expect(directory.routeKey("host:1") == "mooncake/c/rpc_meta/host:1")
    for name in ["", "/a", "a\n", String(repeating: "x", count: 1025)] {
      #expect(throws: MooncakeError.self) { try MetadataDirectory.check(name) }
    }
  }

  @Test func publishesFindsAndRemoves() throws {
    let server = try start()
    defer { server.stop() }
    let target = try engine(server, "tar get/é")
    let actor = try engine(server, "actor")
    let memory = GuardedMemory(4096)
    try target.register(memory.address, length: 4096, access: [.remoteRead, .remoteWrite])
    let segment = try actor.openSegment("tar get/é")
    #expect(try actor.descriptor(of: segment).buffers.count == 1)
    #expect(try actor.openSegment("actor") == 0)
    try actor.probe("tar get/é")
    let service = try store(server)
    #expect(try service.listAll(prefix: "mooncake/", call).entries.count == 4)
    try target.unregister(memory.address)
    _ = try actor.openSegment("tar get/é")
    #expect(try actor.descriptor(of: segment).buffers.isEmpty)
    target.close()
    #expect(try service.listAll(prefix: "mooncake/", call).entries.count == 2)
    do {
      _ = try actor.openSegment("tar get/é")
      Issue.record("found")
    } catch { #expect(error.code == .notFound && error.message.contains(server.uri)) }
    actor.close()
    #expect(try service.listAll(prefix: "", call).entries.isEmpty)
  }

  /// A name is not an address: the service tells where a notification goes.
  @Test func notificationsByName() throws {
    let server = try start()
    defer { server.stop() }
    let target = try engine(server, "target")
    defer { target.close() }
    let actor = try engine(server, "actor")
    defer { actor.close() }
    let memory = GuardedMemory(64)
    try target.register(memory.address, length: 64, access: .remoteWrite)
    let segment = try actor.openSegment("target")
    let local = GuardedMemory(64)
    let request = TransferRequest(
      opcode: .write, segment: segment, source: local.address,
      targetOffset: UInt64(UInt(bitPattern: memory.address)), length: 64)
    let sent = Notification(name: "n", message: "m")
    let batch = try actor.createBatch(capacity: 1)
    try actor.submit(batch, [request], notification: sent)
    let status = try actor.wait(batch, timeoutMilliseconds: 5000)
    #expect(status.state == .completed, "\(actor.failureMessage(of: batch))")
    #expect(target.receiveNotification() == sent)
    try actor.notify(segment, sent)
    #expect(target.receiveNotification() == sent)
  }

  @Test func manyRegistrationsAtOnce() throws {
    let server = try start()
    defer { server.stop() }
    let target = try engine(server, "target")
    defer { target.close() }
    let memory = GuardedMemory(64 * 4096)
    let complaints = Complaints()
    try onThreads(8) { thread in
      for round in 0..<8 {
        let address = memory.address + (thread * 8 + round) * 4096
        complaints.check("register") {
          try target.register(address, length: 4096, access: .remoteRead)
        }
      }
    }
    #expect(complaints.all.isEmpty)
    let text = try #require(try store(server).get("mooncake/ram/target", call))
    #expect(try SegmentDescriptor(json: text).buffers.count == 64)
  }

  @Test func serverComesBackEmpty() throws {
    let server = try start()
    let port = try #require(server.address.port)
    let target = try engine(server, "target")
    defer { target.close() }
    server.stop()
    let memory = GuardedMemory(4096)
    let milliseconds = try elapsedMilliseconds {
      try target.register(memory.address, length: 4096, access: .remoteRead)
    }
    #expect(milliseconds < 9000)
    let again = try start(port: port)
    defer { again.stop() }
    let service = try store(again)
    #expect(
      eventually(within: 10_000) {
        guard let text = try? service.get("mooncake/ram/target", call) else { return false }
        return (try? SegmentDescriptor(json: text).buffers.count) == 1
      })
  }

  @Test func closeDoesNotWaitForAHungServer() throws {
    let server = try start()
    let port = try #require(server.address.port)
    let target = try engine(server, "target")
    server.stop()
    // Accepts connections and never answers.
    let silent = try Socket.listening(
      on: SocketAddress(numeric: "127.0.0.1", port: port)!)
    let memory = GuardedMemory(4096)
    let isRegistered = Atomic(false)
    let thread = try WorkerThread.start(name: "register") {
      try? target.register(memory.address, length: 4096, access: .remoteRead)
      isRegistered.store(true, ordering: .releasing)
    }
    usleep(100_000)
    let opener = try WorkerThread.start(name: "open") { _ = try? target.openSegment("other") }
    usleep(100_000)
    #expect(elapsedMilliseconds { target.close() } < 4000)
    thread.join()
    opener.join()
    let wasRegistered = isRegistered.load(ordering: .acquiring)
    #expect(wasRegistered)
    withExtendedLifetime(silent) {}
  }

  @Test func watchTellsEverything() throws {
    let server = try start()
    defer { server.stop() }
    let service = try store(server)
    try service.put(MetadataEntry(key: "w/a", value: "1"), lease: nil, call)
    let watch = MetadataWatch(service, prefix: "w/")
    #expect(try watch.next(call) == [.put(MetadataEntry(key: "w/a", value: "1"))])
    let quiet = Call(until: .after(milliseconds: 200))
    #expect(try watch.next(quiet).isEmpty)
    let lease = try #require(try service.grant(ttlMilliseconds: 300, call))
    try service.put(MetadataEntry(key: "w/b", value: "2"), lease: lease, call)
    #expect(try watch.next(call) == [.put(MetadataEntry(key: "w/b", value: "2"))])
    #expect(try watch.next(call) == [.delete(key: "w/b")])
    #expect(try service.renew(lease, [], call) != .kept)
  }

  @Test func contendersForOneKey() throws {
    let server = try start()
    defer { server.stop() }
    let service = try store(server)
    let winners = Atomic(0)
    try onThreads(8) { thread in
      let entry = MetadataEntry(key: "lock", value: "\(thread)")
      if (try? service.putIfAbsent(entry, lease: nil, call)) == true {
        winners.wrappingAdd(1, ordering: .relaxed)
      }
    }
    let count = winners.load(ordering: .relaxed)
    #expect(count == 1)
    #expect(try service.delete("lock", call) && !service.delete("lock", call))
  }

  @Test func missingKeysAndMalformedTexts() throws {
    let server = try start()
    defer { server.stop() }
    let service = try store(server)
    let directory = try MetadataDirectory(MetadataURI(parsing: server.uri))
    for (text, code) in [
      ("{", MooncakeError.Code.protocolViolation), ("{}", .protocolViolation),
      (#"{"ip_or_host_name":"h","rpc_port":0}"#, .protocolViolation),
      (#"{"ip_or_host_name":"","rpc_port":5}"#, .protocolViolation),
    ] {
      try service.put(MetadataEntry(key: "mooncake/rpc_meta/x", value: text), lease: nil, call)
      do {
        _ = try directory.route(to: "x", call)
        Issue.record("accepted \(text)")
      } catch { #expect(error.code == code && error.message.contains("mooncake/rpc_meta/x")) }
    }
    try service.put(
      MetadataEntry(
        key: "mooncake/rpc_meta/x",
        value: MetadataDirectory.routeText(
          HostPort(host: "::1", port: 5), incarnation: 7, metadataVersion: 1)), lease: nil, call)
    #expect(try directory.route(to: "x", call) == HostPort(host: "::1", port: 5))
    // Without a data host it is the route's.
    let text = #"{"name":"x","protocol":"tcp","tcp_data_port":9,"buffers":[]}"#
    try service.put(MetadataEntry(key: "mooncake/ram/x", value: text), lease: nil, call)
    #expect(try directory.descriptor(of: "x", call).tcpDataHost == "::1")
  }
}
