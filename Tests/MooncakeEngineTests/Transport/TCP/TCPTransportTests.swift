import MooncakeEngine
import MooncakeSystem
import Testing

@Suite struct TCPTransportTests {
  /// A lightly used peer is served by its first connection alone.
  @Test func peersAreSpreadOverTheLoops() throws {
    let transport = try TCPTransport(makeContext(threadCount: 3))
    defer { transport.stop() }
    // Connections are made on first use, which never comes here.
    let descriptor = SegmentDescriptor(name: "peer", tcpDataHost: "127.0.0.1", tcpDataPort: 9)
    let firstLoops = try (0..<6).map { _ in
      let paths = try transport.connect(
        to: descriptor, former: [], for: SegmentLink("peer", nil), deadline: .never)
      let path = try #require(paths.first as? TCPPath)
      #expect(paths.count == 1 && path.endpoints.count == 2)
      return path.endpoints[0].loop.driverBit
    }
    #expect(firstLoops == [0, 1, 2, 0, 1, 2])
  }
}
