import CLinux
import MooncakeSystem
import Testing

struct NetworkInterfacesTests {
  @Test func loopbackIsListedAndOwned() {
    let entries = NetworkInterfaces.all()
    #expect(entries.contains { $0.address.host == "127.0.0.1" && $0.isUp })
    for host in ["127.0.0.1", "127.0.1.1", "127.255.255.254", "::1", "::ffff:127.0.0.1"] {
      #expect(NetworkInterfaces.owns(SocketAddress(numeric: host, port: 5)!), "\(host)")
    }
  }

  @Test(arguments: ["0.0.0.0", "::", "203.0.113.77", "2001:db8::77", "128.0.0.1"])
  func othersAreNotOwned(host: String) {
    #expect(!NetworkInterfaces.owns(SocketAddress(numeric: host, port: 0)!))
  }

  @Test func everyListedAddressIsOwnedWithAnyPort() {
    for entry in NetworkInterfaces.all() {
      var address = entry.address
      address.port = 4711
      #expect(NetworkInterfaces.owns(address), "\(entry.name) \(address)")
    }
  }

  @Test func firstUsableIsNoLoopback() {
    for ipv6 in [false, true] {
      guard let address = NetworkInterfaces.firstUsable(ipv6: ipv6) else { continue }
      #expect(!address.isLoopback && !address.isAny && !address.isLinkLocal)
      #expect(address.isIPv6 == ipv6)
      #expect(NetworkInterfaces.owns(address))
    }
  }

  @Test func mappedAddressesEqualTheirIPv4Form() {
    let mapped = SocketAddress(numeric: "::ffff:10.0.0.5", port: 1)!
    #expect(mapped.hostBytes == [10, 0, 0, 5])
    #expect(SocketAddress(numeric: "fe80::1", port: 1)!.isLinkLocal)
    #expect(!SocketAddress(numeric: "fec0::1", port: 1)!.isLinkLocal)
  }
}
