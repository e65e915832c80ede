import CLinux
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

@Suite(.serialized) struct ListenAddressTests {
  private func native(
    bind: String? = nil, advertised: String? = nil, port: UInt16 = 0, name: String? = nil
  ) throws(MooncakeError) -> OpenedListener {
    var options = ListenOptions()
    options.bindAddress = bind
    options.advertisedAddress = advertised
    options.port = port
    options.name = name
    return try ListenAddress.open(options)
  }

  private func nativeError(
    bind: String? = nil, advertised: String? = nil, port: UInt16 = 0, name: String? = nil
  ) -> MooncakeError? {
    do throws(MooncakeError) {
      _ = try native(bind: bind, advertised: advertised, port: port, name: name)
      return nil
    } catch {
      return error
    }
  }

  /// A port that was free a moment ago.
  private func freePort() throws -> UInt16 { try makeListener().localAddress().port }

  // MARK: Native

  @Test func nativeDefaultIsLoopback() throws {
    let opened = try native()
    let address = opened.address
    #expect(address.bound.host == "127.0.0.1" && address.port != 0)
    #expect(address.advertisedHost == "127.0.0.1")
    #expect(address.name == "127.0.0.1:\(address.port)")
    _ = try RPCTestPeer(to: address.bound)
    let data = try address.openDataListener()
    let dataAddress = try data.localAddress()
    #expect(dataAddress.host == "127.0.0.1" && dataAddress.port != address.port)
    _ = try RPCTestPeer(to: dataAddress)
  }

  @Test(
    arguments: [
      ("::1", nil, "::1", "::1"), (nil, "::1", "::1", "::1"), (nil, "[::1]", "::1", "::1"),
      (nil, "localhost", "127.0.0.1", "localhost"),
      ("127.0.0.1", "peer.example", "127.0.0.1", "peer.example"),
      ("0.0.0.0", "10.9.8.7", "0.0.0.0", "10.9.8.7"), ("::", "10.9.8.7", "::", "10.9.8.7"),
      (nil, "127.0.0.2", "127.0.0.2", "127.0.0.2"), (nil, "0.0.0.0", "0.0.0.0", "0.0.0.0"),
    ] as [(String?, String?, String, String)])
  func nativeAddresses(
    bind: String?, advertised: String?, bound: String, host: String
  ) throws {
    let address = try native(bind: bind, advertised: advertised).address
    #expect(address.bound.host == bound)
    #expect(address.advertisedHost == host)
    #expect(address.name == HostPort(host: host, port: address.port).description)
  }

  @Test func nativeAnyAdvertisesThisMachine() throws {
    for (any, ipv6) in [("0.0.0.0", false), ("::", true)] {
      let address = try native(bind: any).address
      #expect(address.bound.isAny)
      let advertised = try #require(SocketAddress(numeric: address.advertisedHost, port: 1))
      #expect(NetworkInterfaces.owns(advertised))
      if let first = NetworkInterfaces.outgoing(ipv6: ipv6) {
        #expect(advertised.host == first.host)
      }
    }
  }

  @Test func nativePortIsExact() throws {
    let port = try freePort()
    let opened = try native(port: port)
    #expect(opened.address.port == port)
    let error = nativeError(port: port)
    #expect(error?.code == .addressInUse)
    #expect(error?.message.contains("127.0.0.1:\(port)") == true)
    _ = consume opened
    // Free again, at once.
    _ = try native(port: port)
  }

  @Test func nativeNameMustBeTheAddress() throws {
    let port = try freePort()
    #expect(try native(name: "127.0.0.1:\(port)").address.port == port)
    #expect(try native(port: port, name: "127.0.0.1:\(port)").address.port == port)
    #expect(nativeError(port: port, name: "127.0.0.1:1")?.code == .invalidArgument)
    #expect(nativeError(name: "trainer")?.code == .invalidArgument)
    #expect(nativeError(name: "")?.code == .invalidArgument)
    var options = ListenOptions()
    options.name = "trainer"
    options.usesMetadataService = true
    #expect(try ListenAddress.open(options).address.name == "trainer")
  }

  @Test(
    arguments: [
      ("localhost", nil), ("x y", nil), ("", nil), ("10.0.0.5:80", nil), ("203.0.113.77", nil),
      (nil, ""), (nil, "a b"), (nil, "127.0.0.1:80"), (nil, "203.0.113.77"), (nil, "[::1"),
    ] as [(String?, String?)])
  func nativeRejects(bind: String?, advertised: String?) {
    #expect(nativeError(bind: bind, advertised: advertised)?.code == .invalidArgument)
  }

  @Test func nativeUnresolvable() {
    #expect(nativeError(advertised: "no-such-host.invalid")?.code == .unresolved)
  }

  // MARK: Drop-in

  private func dropIn(
    _ name: String, host: String? = nil, port: UInt64 = 0, usesStore: Bool = false,
    change: (inout HandshakeSettings) -> Void = { _ in }
  ) throws(MooncakeError) -> OpenedListener {
    var options = DropInListenOptions(serverName: name)
    options.hostName = host
    options.port = port
    options.usesStore = usesStore
    var settings = HandshakeSettings()
    change(&settings)
    return try ListenAddress.open(options, settings: settings)
  }

  @Test(arguments: [
    ("127.0.0.1", "127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1", "localhost"),
    ("127.0.0.1:x", "127.0.0.1", "127.0.0.1"), ("[::1]", "::1", "::1"), ("::1", "::1", "::1"),
    ("203.0.113.77", "0.0.0.0", "203.0.113.77"), ("2001:db8::77", "::", "2001:db8::77"),
    ("no-such-host.invalid", "0.0.0.0", "no-such-host.invalid"), ("0.0.0.0", "0.0.0.0", "0.0.0.0"),
  ])
  func dropInAddresses(name: String, bound: String, host: String) throws {
    let address = try dropIn(name).address
    #expect(address.bound.host == bound)
    #expect(address.advertisedHost == host)
    #expect((15000...17000).contains(address.port))
    #expect(address.name == HostPort(host: host, port: address.port).description)
    let data = try address.openDataListener().localAddress()
    #expect(data.host == bound && (15000...17000).contains(data.port))
  }

  @Test func dropInBindsThisMachinesAddress() throws {
    let first = try #require(
      NetworkInterfaces.firstUsable() ?? SocketAddress(numeric: "127.0.0.1", port: 0))
    #expect(try dropIn(first.host).address.bound.host == first.host)
  }

  @Test func dropInHonorsAFreePortAndReplacesATakenOne() throws {
    let port = try freePort()
    let opened = try dropIn("127.0.0.1:\(port)")
    #expect(opened.address.port == port)
    let other = try dropIn("127.0.0.1:\(port)").address
    #expect(other.port != port && (15000...17000).contains(other.port))
    #expect(other.name == "127.0.0.1:\(other.port)")
    let second = try freePort()
    #expect(try dropIn("127.0.0.1", port: UInt64(second)).address.port == second)
    #expect((15000...17000).contains(try dropIn("127.0.0.1", port: .max).address.port))
  }

  @Test func dropInWithoutServerNameUsesTheHostName() throws {
    #expect(try dropIn("", host: "127.0.0.1").address.advertisedHost == "127.0.0.1")
    for name in ["", ":", "a b", "[x]"] {
      #expect(throws: MooncakeError.self) { _ = try dropIn(name) }
    }
  }

  @Test func dropInWithAStoreKeepsTheName() throws {
    let address = try dropIn("trainer", usesStore: true) {
      $0.advertisedAddress = "127.0.0.1"
    }.address
    #expect(address.name == "trainer")
    #expect(address.advertisedHost == "127.0.0.1" && address.bound.host == "127.0.0.1")

    let interface = try dropIn("trainer", usesStore: true).address
    #expect(interface.advertisedHost == NetworkInterfaces.outgoing()?.host ?? "trainer")

    let port = try freePort()
    let legacy = try dropIn("127.0.0.1", usesStore: true) {
      $0.isLegacyPortBinding = true
      $0.defaultPort = port
    }.address
    #expect(legacy.port == port && legacy.advertisedHost == "127.0.0.1")
    #expect(legacy.name == "127.0.0.1")
  }

  @Test func exhaustedRangeIsAnError() throws {
    let port = try freePort()
    let opened = try dropIn("127.0.0.1") { $0.portRange = port...port }
    #expect(opened.address.port == port)
    do throws(MooncakeError) {
      _ = try dropIn("127.0.0.1") { $0.portRange = port...port }
      Issue.record("opened")
    } catch {
      #expect(error.code == .addressInUse)
      #expect(error.message.contains("MC_MIN_RPC_PORT"))
    }
    _ = consume opened
  }

  @Test func ipv6AnyIsTakenWhenAskedFor() throws {
    let opened = try dropIn("no-such-host.invalid") { $0.usesIPv6 = true }
    #expect(opened.address.bound.host == "::")
    // It also serves IPv4.
    _ = try RPCTestPeer(to: SocketAddress(numeric: "127.0.0.1", port: opened.address.port)!)
  }
}
