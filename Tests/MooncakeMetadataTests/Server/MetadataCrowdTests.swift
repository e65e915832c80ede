import Glibc
import MooncakeMetadata
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Clients that are many, slow or silent, and which of them are dropped for others.
@Suite(.serialized)
struct MetadataCrowdTests {
  private var smallLimits: MetadataLimits {
    var limits = MetadataLimits()
    limits.connectionCount = 40
    limits.connectionsPerHost = 30
    return limits
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

  @Test func newClientsDoNotEndEachOther() throws {
    let server = try MetadataServer(MetadataServer.Options(), smallLimits)
    defer { server.stop() }
    let complaints = Complaints()
    let isOver = Atomic(false)
    let waiting = Atomic(0)
    try onThreads(50) { index in
      complaints.check("client \(index)") {
        if index < 30 {
          let client = try MetadataTestClient(to: server)
          _ = try client.ask("GET", "/metadata?key=k")
          waiting.add(1, ordering: .relaxed)
          while !isOver.load(ordering: .relaxed) { usleep(10_000) }
          return
        }
        while waiting.load(ordering: .relaxed) < 30 { usleep(1000) }
        waiting.add(1, ordering: .relaxed)
        while waiting.load(ordering: .relaxed) < 50 { usleep(100) }
        let client = try MetadataTestClient(to: server)
        // Its request takes a moment.
        usleep(20_000)
        let put = try client.ask("PUT", "/metadata?key=k", "v")
        complaints.require(put.status == 200, "\(put)")
        usleep(100_000)
        isOver.store(true, ordering: .relaxed)
      }
    }
    #expect(complaints.all == [])
  }

  @Test func oneAddressDoesNotTakeEveryPlace() throws {
    var limits = smallLimits
    limits.graceMilliseconds = 60_000
    let server = try MetadataServer(MetadataServer.Options(), limits)
    defer { server.stop() }
    let revision = try MetadataTestClient.revision(of: server)
    let complaints = Complaints()
    try onThreads(31) { index in
      complaints.check("client \(index)") {
        if index > 0 {
          let client = try MetadataTestClient(to: server)
          let answer = try client.ask(
            "GET", "/metadata?prefix=w&since=\(revision)&wait_ms=3000")
          return complaints.require(answer.status == 200, "\(answer)")
        }
        // A watch is waiting for the server, so it is not dropped.
        usleep(1_000_000)
        for _ in 0..<20 {
          let refused = try MetadataTestClient(to: server)
          // The refusal may precede this request, which must not discard it.
          try refused.send("GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
          usleep(5000)
          let answer = try refused.receive()
          complaints.require(answer.status == 503, "\(answer)")
        }
        let other = try MetadataTestClient(to: server, from: "127.0.0.2")
        complaints.require(
          try other.ask("GET", "/health", within: Self.soon).status == 200, "health")
      }
    }
    #expect(complaints.all == [])
  }

  @Test func longWatchesMakeRoom() throws {
    let server = try MetadataServer(MetadataServer.Options(), smallLimits)
    defer { server.stop() }
    let revision = try MetadataTestClient.revision(of: server)
    let complaints = Complaints()
    let endedCount = Atomic(0)
    try onThreads(41) { index in
      complaints.check("client \(index)") {
        if index > 0 {
          let host = index > 30 ? "127.0.0.2" : "127.0.0.1"
          let client = try MetadataTestClient(to: server, from: host)
          let time = try elapsedMilliseconds {
            let answer = try client.ask(
              "GET", "/metadata?prefix=w&since=\(revision)&wait_ms=6000")
            complaints.require(answer.status == 200, "\(answer)")
          }
          if time < 5500 { endedCount.add(1, ordering: .relaxed) }
          return
        }
        usleep(2_500_000)
        // First an address at its limit, then the server.
        let (ask, path) = ("GET", "/metadata?key=k")
        let first = try MetadataTestClient(to: server)
        let found = try first.ask(ask, path, within: Self.soon)
        try first.send(
          "GET /metadata?prefix=w&since=\(revision)&wait_ms=6000 HTTP/1.1\r\nHost: h\r\n\r\n")
        usleep(200_000)
        let second = try MetadataTestClient(to: server, from: "127.0.0.3")
        let other = try second.ask(ask, path, within: Self.soon)
        complaints.require(found.status == 404 && other.status == 404, "\(found) \(other)")
        usleep(200_000)
      }
    }
    #expect(complaints.all == [] && endedCount.load(ordering: .relaxed) == 2)
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

  @Test func whoHoldsTheMemoryGivesWay() throws {
    var limits = MetadataLimits()
    limits.passingBytes = 1 << 20
    let server = try MetadataServer(MetadataServer.Options(), limits)
    defer { server.stop() }
    let complaints = Complaints()
    let isOver = Atomic(false)
    let value = String(repeating: "v", count: 900_000)
    try onThreads(9) { index in
      complaints.check("client \(index)") {
        if index > 0 {
          // Only heads: they occupy no memory.
          let client = try MetadataTestClient(to: server)
          try client.send(
            "PUT /metadata?key=\(index) HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\n")
          while !isOver.load(ordering: .relaxed) { usleep(10_000) }
          try client.send("v")
          return complaints.require(try client.receive().status == 200, "a head was closed")
        }
        defer { isOver.store(true, ordering: .relaxed) }
        usleep(300_000)
        let slow = try MetadataTestClient(to: server, from: "127.0.0.2")
        try slow.send(
          "PUT /metadata?key=slow HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n" + value)
        usleep(1_300_000)
        let client = try MetadataTestClient(to: server, from: "127.0.0.2")
        complaints.require(
          try client.ask("PUT", "/metadata?key=a", value).status == 503, "no limit")
        complaints.require(try slow.receive().status == 0, "the slow one stays")
        complaints.require(
          try client.ask("PUT", "/metadata?key=a", value).status == 200, "no room was made")
      }
    }
    #expect(complaints.all == [])
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
    #expect(statuses.first == 503 && statuses.last == 200, "\(statuses)")
    #expect(statuses.dropLast().allSatisfy { $0 == 503 }, "\(statuses)")
    let rest = try slow.receive()
    #expect(rest.status == 0 && rest.body.utf8.count < 10 << 20)
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
    // A watch is not a slow request.
    let client = try MetadataTestClient(to: server)
    let revision = try MetadataTestClient.revision(of: server)
    let time = try elapsedMilliseconds {
      let answer = try client.ask("GET", "/metadata?prefix=w&since=\(revision)&wait_ms=1500")
      #expect(answer.status == 200)
    }
    #expect(time >= 1400)
  }

  @Test func silenceAndUnreadAnswersAreBounded() throws {
    var limits = MetadataLimits()
    limits.requestMilliseconds = 2000
    let server = try MetadataServer(MetadataServer.Options(), limits)
    defer { server.stop() }
    let silent = try MetadataTestClient(to: server)
    let value = String(repeating: "v", count: 12 << 20)
    #expect(try silent.ask("PUT", "/metadata?key=a", value).status == 200)
    let reader = try MetadataTestClient(to: server)
    try reader.send("GET /metadata?key=a HTTP/1.1\r\nHost: h\r\n\r\n")
    var end: Int?
    let time = elapsedMilliseconds { end = try? silent.receive().status }
    #expect(end == 0)
    #expect((1500...6000).contains(time), "closed after \(time) ms")
    usleep(1_500_000)
    let rest = try reader.receive()
    #expect(rest.status == 0 && rest.body.utf8.count < 12 << 20)
  }
}
