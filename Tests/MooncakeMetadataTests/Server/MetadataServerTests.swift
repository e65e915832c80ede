import Glibc
import MooncakeBase
import MooncakeMetadata
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// A server under load, with slow disks and slow clients, and across restarts.
@Suite(.serialized)
struct MetadataServerTests {
  @Test func writersStopNeitherLeasesNorWatches() throws {
    let folder = JournalFolder()
    let server = try folder.server(onDisk: JournalFolder.slowDisk(syncDataMilliseconds: 20))
    defer { server.stop() }
    let complaints = Complaints()
    let isOver = Atomic(false)
    try onThreads(12) { index in
      complaints.check("thread \(index)") {
        let client = try MetadataTestClient(to: server)
        if index == 0 {
          defer { isOver.store(true, ordering: .relaxed) }
          let lease = try client.grant(ttlMilliseconds: 500)
          let answer = try client.ask("PUT", "/metadata?key=leased&lease=\(lease)", "v")
          complaints.require(answer.status == 200, "\(answer)")
          let time = try elapsedMilliseconds {
            while try client.ask("GET", "/metadata?key=leased").status == 200 { usleep(10_000) }
          }
          complaints.require((400...5000).contains(time), "the lease lasted \(time) ms")
          // The watch continues beside the writers.
          usleep(time < 1500 ? UInt32(1500 - time) * 1000 : 0)
          return
        }
        if index == 1 {
          let revision = try MetadataTestClient.revision(of: server)
          let time = try elapsedMilliseconds {
            let answer = try client.ask(
              "GET", "/metadata?prefix=none&since=\(revision)&wait_ms=1000")
            complaints.require(answer.status == 200, "\(answer)")
          }
          return complaints.require((900..<5000).contains(time), "the watch lasted \(time) ms")
        }
        var count = 0
        let deadline = Deadline.after(milliseconds: 20_000)
        while !isOver.load(ordering: .relaxed) && !deadline.hasPassed {
          count += 1
          let answer = try client.ask("PUT", "/metadata?key=w\(index)-\(count % 10)", "v\(count)")
          complaints.require(answer.status == 200, "\(answer)")
          // Spread out, so that some arrive while the disk is busy with others.
          usleep(UInt32(1000 * ((index + count) % 10)))
        }
        complaints.require(count > 10, "only \(count) writes")
      }
    }
    #expect(complaints.all == [])
  }

  @Test func leasesEndOnSlowDisks() throws {
    let folder = JournalFolder()
    let server = try folder.server(onDisk: JournalFolder.slowDisk(syncDataMilliseconds: 700))
    defer { server.stop() }
    let client = try MetadataTestClient(to: server)
    let lease = try client.grant(ttlMilliseconds: 1000)
    let deadline = Deadline.after(milliseconds: 15_000)
    var last = 200
    let time = try elapsedMilliseconds {
      while last == 200 && !deadline.hasPassed {
        last = try client.ask("PUT", "/metadata?key=a&lease=\(lease)", "v").status
      }
    }
    #expect(last == 412 && (900..<10_000).contains(time), "\(last): it lasted \(time) ms")
  }

  @Test func leasesBeginWhenTheServerServes() throws {
    let folder = JournalFolder()
    try folder.write([
      .grant(lease: 7, ttlMilliseconds: 1500), .put(key: "a", value: [65], lease: 7),
    ])
    let server = try folder.server(onDisk: JournalFolder.slowDisk(syncMilliseconds: 1000))
    defer { server.stop() }
    let client = try MetadataTestClient(to: server)
    usleep(200_000)
    #expect(try client.ask("POST", "/metadata/lease?id=7").status == 200)
    #expect(try client.ask("GET", "/metadata?key=a").body == "A")
  }

  @Test func smallerLimitsLoseNothing() throws {
    let folder = JournalFolder()
    var options = folder.serverOptions
    options.maximumBytes = 4 << 20
    var server = try MetadataServer(options)
    for index in 0..<20 {
      let client = try MetadataTestClient(to: server)
      let value = String(repeating: "v", count: 100_000)
      #expect(try client.ask("PUT", "/metadata?key=k\(index)", value).status == 200)
    }
    server.stop()
    options.maximumBytes = 1 << 20
    let error = try #require(throws: MooncakeError.self) { try MetadataServer(options) }
    #expect(error.code == .invalidArgument)
    for word in [folder.path, "--memory 2MiB", "maximum_bytes", "\(1 << 20)"] {
      #expect(error.message.contains(word), "\(error.message)")
    }
    options.maximumBytes = 2 << 20
    server = try MetadataServer(options)
    defer { server.stop() }
    let client = try MetadataTestClient(to: server)
    #expect(try client.ask("GET", "/health").body.contains("\"keys\":20"))
  }

  /// A disk that is slow while a flag is set.
  private final class Slowness: Sendable {
    let milliseconds = Atomic(0)

    var disk: MetadataJournal.Disk {
      var disk = MetadataJournal.Disk()
      disk.syncData = { descriptor in
        usleep(UInt32(self.milliseconds.exchange(0, ordering: .relaxed)) * 1000)
        return fdatasync(descriptor)
      }
      return disk
    }
  }

  @Test func renewalsBehindACrowdCountAfterAStall() throws {
    let folder = JournalFolder()
    let slowness = Slowness()
    let server = try folder.server(onDisk: slowness.disk)
    defer { server.stop() }
    let writer = try MetadataTestClient(to: server)
    let lease = try writer.grant(ttlMilliseconds: 500)
    slowness.milliseconds.store(2500, ordering: .relaxed)
    try writer.send("PUT /metadata?key=a HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
    usleep(300_000)
    // More than it takes at once, and then the renewal.
    let complaints = Complaints()
    try onThreads(301) { index in
      complaints.check("client \(index)") {
        if index == 0 { usleep(1_000_000) }
        let client = try MetadataTestClient(to: server)
        if index > 0 {
          usleep(2_500_000)
          return
        }
        let answer = try client.ask("POST", "/metadata/lease?id=\(lease)")
        complaints.require(answer.status == 200, "\(answer)")
      }
    }
    #expect(complaints.all == [])
    #expect(try writer.receive().status == 200)
  }

  /// A change does not wait while the journal is rewritten, and changes made meanwhile are in it
  /// exactly once.
  @Test func writingTheJournalAnewDelaysNoAnswer() throws {
    let folder = JournalFolder()
    var options = MetadataServer.Options()
    options.directory = folder.path
    let slowness = Slowness()
    let syncMilliseconds = Box(0)
    let syncCount = Box(0)
    var disk = slowness.disk
    disk.sync = { descriptor in
      syncCount.update { $0 += 1 }
      usleep(UInt32(syncMilliseconds.value) * 1000)
      return fsync(descriptor)
    }
    let server = try MetadataServer(options, MetadataLimits(), disk: disk)
    let client = try MetadataTestClient(to: server)
    let other = try MetadataTestClient(to: server)
    #expect(try other.ask("GET", "/metadata?key=a").status == 404)
    let value = String(repeating: "v", count: 1 << 20)
    let before = syncCount.value
    syncMilliseconds.value = 1500
    var slowest: UInt64 = 0
    var leases: [String] = []
    for index in 0..<9 where syncCount.value == before {
      // The other client's request comes while the change is synced.
      slowness.milliseconds.store(200, ordering: .relaxed)
      let sent = Clock.now()
      try client.send(
        "PUT /metadata?key=a HTTP/1.1\r\nHost: h\r\nContent-Length: \(value.utf8.count)\r\n\r\n"
          + value)
      usleep(100_000)
      try other.send(
        "POST /metadata/lease?ttl_ms=60000 HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
      #expect(try client.receive().status == 200)
      slowest = max(slowest, (Clock.now() - sent) / 1_000_000)
      let answer = try other.receive()
      #expect(answer.status == 200, "of \(index)")
      leases += answer.body.split(separator: "\"").filter { UInt64($0) != nil }.map(String.init)
    }
    #expect(syncCount.value > before && slowest < 1400, "an answer took \(slowest) ms")
    syncMilliseconds.value = 0
    server.stop()
    let next = try MetadataServer(options)
    defer { next.stop() }
    let reader = try MetadataTestClient(to: next)
    #expect(try reader.ask("GET", "/metadata?key=a").body.utf8.count == value.utf8.count)
    for lease in leases {
      #expect(try reader.ask("POST", "/metadata/lease?id=\(lease)").status == 200)
    }
  }

  /// A connection is dropped after its request has arrived, but before it was read.
  @Test func whatIsNotAnsweredIsNotDone() throws {
    let folder = JournalFolder()
    let slowness = Slowness()
    let server = try folder.server(onDisk: slowness.disk) { $0.connectionCount = 2 }
    defer { server.stop() }
    let idle = try MetadataTestClient(to: server)
    #expect(try idle.ask("GET", "/metadata?key=a").status == 404)
    let writer = try MetadataTestClient(to: server)
    #expect(try writer.ask("GET", "/metadata?key=a").status == 404)
    slowness.milliseconds.store(1000, ordering: .relaxed)
    try writer.send("PUT /metadata?key=slow HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nv")
    usleep(300_000)
    try idle.send(
      "PUT /metadata?key=lock&absent=1 HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nv")
    let third = try MetadataTestClient(to: server)
    #expect(try writer.receive().status == 200)
    let status = try idle.receive().status
    let isThere = try third.ask("GET", "/metadata?key=lock").status == 200
    #expect(status == 200 || !isThere, "answered \(status), and the key is there")
  }

  /// A client whose request arrives while the disk blocks the server does not count as silent.
  @Test func whoAsksDuringAStallIsHeard() throws {
    let folder = JournalFolder()
    let slowness = Slowness()
    let server = try folder.server(onDisk: slowness.disk) { $0.requestMilliseconds = 600 }
    defer { server.stop() }
    let idle = try MetadataTestClient(to: server)
    #expect(try idle.ask("GET", "/metadata?key=a").status == 404)
    let writer = try MetadataTestClient(to: server)
    slowness.milliseconds.store(1000, ordering: .relaxed)
    try writer.send("PUT /metadata?key=slow HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nv")
    usleep(200_000)
    #expect(try idle.ask("PUT", "/metadata?key=b", "v").status == 200)
    #expect(try writer.receive().status == 200)
  }

  @Test func questionsAreBounded() throws {
    let server = try MetadataServer()
    defer { server.stop() }
    let client = try MetadataTestClient(to: server)
    let long = "[\"" + String(repeating: "k", count: 3 << 20) + "\"]"
    #expect(try client.ask("POST", "/metadata/values", long).status == 413)
    let store = try MetadataServices.open(MetadataURI(parsing: server.uri))
    let call = Call(until: .after(milliseconds: 20_000))
    // Each character takes six bytes in a request.
    let keys = (0..<400).map { String(repeating: "\u{1}", count: 2000) + "\($0)" }
    try store.put(MetadataEntry(key: keys[399], value: "last"), lease: nil, call)
    let values = try store.values(of: keys, call)
    #expect(values.count == 400 && values.last == "last" && values.first == .some(nil))
  }

  @Test func aStopAnswersWhatWaits() throws {
    let folder = JournalFolder()
    let slowness = Slowness()
    let server = try folder.server(onDisk: slowness.disk)
    let revision = try MetadataTestClient.revision(of: server)
    let watch = try MetadataTestClient(to: server)
    try watch.send(
      "GET /metadata?prefix=w&since=\(revision)&wait_ms=30000 HTTP/1.1\r\nHost: h\r\n\r\n")
    usleep(200_000)
    slowness.milliseconds.store(700, ordering: .relaxed)
    let writer = try MetadataTestClient(to: server)
    try writer.send("PUT /metadata?key=a HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nv")
    usleep(200_000)
    let time = elapsedMilliseconds { server.stop() }
    #expect(time < 5000, "the stop took \(time) ms")
    #expect(try writer.receive().status == 200)
    #expect(try watch.receive().status == 503)
    let next = try MetadataServer(folder.serverOptions)
    defer { next.stop() }
    #expect(try MetadataTestClient(to: next).ask("GET", "/metadata?key=a").body == "v")
  }
}
