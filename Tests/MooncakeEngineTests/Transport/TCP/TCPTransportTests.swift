import MooncakeEngine
import MooncakeSystem
import Testing

@Suite struct TCPTransportTests {
  /// A lightly used peer is served by its first connection alone.
  @Test func peersAreSpreadOverTheLoops() throws {
    let settings = TCPTransport.Settings(
      threadCount: 3, connectionsPerPeer: 2, spinNanoseconds: 1000)
    let local = try #require(SocketAddress(numeric: "127.0.0.1", port: 0))
    let transport = try TCPTransport(
      listener: Socket.listening(on: local), buffers: BufferTable(), settings: settings,
      drivers: DriverTable())
    defer { transport.stop() }
    // Connections are made on first use, which never comes here.
    let descriptor = SegmentDescriptor(name: "peer", tcpDataHost: "127.0.0.1", tcpDataPort: 9)
    let firstLoops = try (0..<6).map { _ in
      let group = try transport.connect(
        to: descriptor, deadline: .never, handlers: .init(trouble: {}, refusal: { _ in }))
      #expect(group.endpoints.count == 2)
      return group.endpoints[0].loop.driverBit
    }
    #expect(firstLoops == [0, 1, 2, 0, 1, 2])
  }
}
