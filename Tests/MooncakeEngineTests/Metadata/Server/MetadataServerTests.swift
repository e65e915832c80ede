import Glibc
import MooncakeEngine
import MooncakeSystem
import Synchronization
import Testing

/// A server under load, with slow disks and slow clients, and over restarts.
@Suite(.serialized)
struct MetadataServerTests {
  @Test func writersStopNeitherLeasesNorWatches() throws {
    let folder = JournalFolder()
    var options = MetadataServer.Options()
    options.directory = folder.path
    var disk = MetadataJournal.Disk()
    disk.syncData = { descriptor in
      usleep(20_000)
      return fdatasync(descriptor)
    }
    let server = try MetadataServer(options, MetadataLimits(), disk: disk)
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
          // The watch goes on beside the writers.
          usleep(time < 1500 ? UInt32(1500 - time) * 1000 : 0)
          return
        }
        if index == 1 {
          let revision = try revision(of: server)
          let time = try elapsedMilliseconds {
            let answer = try client.ask(
              "GET", "/metadata?prefix=none&since=\(revision)&wait_ms=1000")
            complaints.require(answer.status == 200 || answer.status == 410, "\(answer)")
          }
          return complaints.require(time < 5000, "the watch lasted \(time) ms")
        }
        var count = 0
        let deadline = Deadline.after(milliseconds: 20_000)
        while !isOver.load(ordering: .relaxed) && !deadline.hasPassed {
          count += 1
          let answer = try client.ask("PUT", "/metadata?key=w\(index)-\(count % 10)", "v\(count)")
          complaints.require(answer.status == 200, "\(answer)")
          // Spread, so that some come while the disk is busy with others.
          usleep(UInt32(1000 * ((index + count) % 10)))
        }
        complaints.require(count > 10, "only \(count) writes")
      }
    }
    #expect(complaints.all == [])
  }

  @Test func leasesEndOnSlowDisks() throws {
    let folder = JournalFolder()
    var options = MetadataServer.Options()
    options.directory = folder.path
    var disk = MetadataJournal.Disk()
    disk.syncData = { descriptor in
      usleep(700_000)
      return fdatasync(descriptor)
    }
    let server = try MetadataServer(options, MetadataLimits(), disk: disk)
    defer { server.stop() }
    let client = try MetadataTestClient(to: server)
    let lease = try client.grant(ttlMilliseconds: 1000)
    let time = try elapsedMilliseconds {
      while try client.ask("PUT", "/metadata?key=a&lease=\(lease)", "v").status == 200 {}
    }
    #expect(time < 10_000, "the lease lasted \(time) ms")
  }

  @Test func leasesBeginWhenTheServerServes() throws {
    let folder = JournalFolder()
    try folder.write([
      .grant(lease: 7, ttlMilliseconds: 1500), .put(key: "a", value: [65], lease: 7),
    ])
    var options = MetadataServer.Options()
    options.directory = folder.path
    var disk = MetadataJournal.Disk()
    disk.sync = { descriptor in
      usleep(1_000_000)
      return fsync(descriptor)
    }
    let server = try MetadataServer(options, MetadataLimits(), disk: disk)
    defer { server.stop() }
    let client = try MetadataTestClient(to: server)
    usleep(200_000)
    #expect(try client.ask("POST", "/metadata/lease?id=7").status == 200)
    #expect(try client.ask("GET", "/metadata?key=a").body == "A")
  }

  @Test func smallerLimitsLoseNothing() throws {
    let folder = JournalFolder()
    var options = MetadataServer.Options()
    options.directory = folder.path
    options.maximumBytes = 4 << 20
    var server = try MetadataServer(options)
    for index in 0..<20 {
      let client = try MetadataTestClient(to: server)
      let value = String(repeating: "v", count: 100_000)
      #expect(try client.ask("PUT", "/metadata?key=k\(index)", value).status == 200)
    }
    server.stop()
    options.maximumBytes = 1 << 20
    let error = try #require(throws: EngineError.self) { try MetadataServer(options) }
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

  // MARK: Slow clients

  private var smallLimits: MetadataLimits {
    var limits = MetadataLimits()
    limits.connectionCount = 40
    limits.connectionsPerHost = 30
    return limits
  }

  private func revision(of server: MetadataServer) throws -> String {
    let health = try MetadataTestClient(to: server).ask("GET", "/health").body
    return String(health.split { !$0.isNumber }.last { $0.count > 10 } ?? "")
  }

  private static let soon: UInt64 = Sanitizer.isAny ? 5000 : 1000

  @Test func slowClientsMakeRoom() throws {
    let server = try MetadataServer(MetadataServer.Options(), smallLimits)
    defer { server.stop() }
    let complaints = Complaints()
    let isOver = Atomic(false)
    try onThreads(61) { index in
      complaints.check("client \(index)") {
        if index > 0 {
          while !isOver.load(ordering: .relaxed) {
            let client = try MetadataTestClient(to: server)
            while !isOver.load(ordering: .relaxed) {
              // It ends when the server closes it.
              guard (try? client.send("G")) != nil else { break }
              usleep(100_000)
            }
          }
          return
        }
        defer { isOver.store(true, ordering: .relaxed) }
        usleep(500_000)
        for host in ["127.0.0.1", "127.0.0.2"] {
          for round in 0..<10 {
            let client = try MetadataTestClient(to: server, from: host)
            let health = try client.ask("GET", "/health", within: Self.soon)
            let put = try client.ask("PUT", "/metadata?key=k", "v\(round)", within: Self.soon)
            complaints.require(health.status == 200 && put.status == 200, "\(health) \(put)")
          }
        }
      }
    }
    #expect(complaints.all == [])
  }

  @Test func oneAddressDoesNotTakeEveryPlace() throws {
    let server = try MetadataServer(MetadataServer.Options(), smallLimits)
    defer { server.stop() }
    let revision = try revision(of: server)
    let complaints = Complaints()
    try onThreads(31) { index in
      complaints.check("client \(index)") {
        if index > 0 {
          let client = try MetadataTestClient(to: server)
          _ = try client.ask("GET", "/metadata?prefix=w&since=\(revision)&wait_ms=3000")
          return
        }
        // Watches are the server's business: they do not give way.
        usleep(1_000_000)
        let refused = try MetadataTestClient(to: server).receive()
        complaints.require(refused.status == 503, "\(refused)")
        let other = try MetadataTestClient(to: server, from: "127.0.0.2")
        complaints.require(
          try other.ask("GET", "/health", within: Self.soon).status == 200, "health")
      }
    }
    #expect(complaints.all == [])
  }

  @Test func slowValuesGiveWay() throws {
    var limits = MetadataLimits()
    limits.passingBytes = 1 << 20
    let server = try MetadataServer(MetadataServer.Options(), limits)
    defer { server.stop() }
    let slow = try MetadataTestClient(to: server)
    let value = String(repeating: "v", count: 900_000)
    try slow.send(
      "PUT /metadata?key=slow HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n" + value)
    usleep(300_000)
    let client = try MetadataTestClient(to: server, from: "127.0.0.2")
    // Not slow yet.
    #expect(try client.ask("PUT", "/metadata?key=a", value).status == 503)
    usleep(1_000_000)
    var statuses: [Int] = []
    let deadline = Deadline.after(milliseconds: 5000)
    while statuses.last != 200 && !deadline.hasPassed {
      statuses.append(try client.ask("PUT", "/metadata?key=a", value).status)
      usleep(20_000)
    }
    #expect(statuses.last == 200 && statuses.dropLast().allSatisfy { $0 == 503 }, "\(statuses)")
    #expect(try slow.receive().status == 0)
    #expect(try client.ask("GET", "/metadata?key=slow").status == 404)
  }

  @Test func answersThatNobodyTakesGiveWay() throws {
    var limits = MetadataLimits()
    limits.passingBytes = 12 << 20
    let server = try MetadataServer(MetadataServer.Options(), limits)
    defer { server.stop() }
    let client = try MetadataTestClient(to: server, from: "127.0.0.2")
    let value = String(repeating: "v", count: 10 << 20)
    #expect(try client.ask("PUT", "/metadata?key=a", value).status == 200)
    let slow = try MetadataTestClient(to: server)
    try slow.send("GET /metadata?key=a HTTP/1.1\r\nHost: h\r\n\r\n")
    usleep(1_200_000)
    var statuses: [Int] = []
    let deadline = Deadline.after(milliseconds: 10_000)
    while statuses.last != 200 && !deadline.hasPassed {
      statuses.append(try client.ask("GET", "/metadata?key=a").status)
      usleep(20_000)
    }
    #expect(statuses.last == 200 && statuses.dropLast().allSatisfy { $0 == 503 }, "\(statuses)")
  }

  @Test func requestsAreBoundedAsAWhole() throws {
    var limits = MetadataLimits()
    limits.requestMilliseconds = 500
    let server = try MetadataServer(MetadataServer.Options(), limits)
    defer { server.stop() }
    let put = "PUT /metadata?key=a HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n"
    for beginning in ["", put] {
      let client = try MetadataTestClient(to: server)
      try client.send(beginning)
      let time = elapsedMilliseconds {
        while (try? client.send("G")) != nil { usleep(50_000) }
      }
      #expect((300...5000).contains(time), "closed after \(time) ms")
    }
    // A watch is no slow request.
    let client = try MetadataTestClient(to: server)
    let revision = try revision(of: server)
    let time = try elapsedMilliseconds {
      let answer = try client.ask("GET", "/metadata?prefix=w&since=\(revision)&wait_ms=1500")
      #expect(answer.status == 200)
    }
    #expect(time >= 1400)
  }
}
