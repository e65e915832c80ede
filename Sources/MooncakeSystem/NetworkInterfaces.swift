import CLinux
import Glibc

/// The addresses of this machine.
package enum NetworkInterfaces {
  /// One address of one interface.
  package struct Entry: Sendable, Equatable {
    package let name: String
    /// Port 0.
    package let address: SocketAddress
    package let isUp: Bool
    package let isRunning: Bool
  }

  /// Every IPv4 and IPv6 address in the system's order; empty if the system does not say.
  package static func all() -> [Entry] {
    var list: UnsafeMutablePointer<ifaddrs>?
    if getifaddrs(&list) != 0 { return [] }
    defer { freeifaddrs(list) }
    var entries: [Entry] = []
    var next = list
    while let item = next {
      next = item.pointee.ifa_next
      guard let pointer = item.pointee.ifa_addr else { continue }
      let length: Int
      switch Int32(pointer.pointee.sa_family) {
      case AF_INET: length = MemoryLayout<sockaddr_in>.size
      case AF_INET6: length = MemoryLayout<sockaddr_in6>.size
      default: continue
      }
      let flags = item.pointee.ifa_flags
      entries.append(
        Entry(
          name: String(cString: item.pointee.ifa_name),
          address: SocketAddress(pointer, length: socklen_t(length)),
          isUp: flags & UInt32(IFF_UP) != 0,
          isRunning: flags & UInt32(IFF_RUNNING) != 0))
    }
    return entries
  }

  /// The first address of an interface that is up, running and not the loopback. Link-local IPv6
  /// addresses are skipped: without a scope they are useless to a peer.
  package static func firstUsable(ipv6: Bool = false) -> SocketAddress? {
    usable(ipv6: ipv6).first?.address
  }

  /// The source address of packets to the outside: that of the default route's interface, or
  /// `firstUsable` without such a route. Sends nothing.
  package static func outgoing(ipv6: Bool = false) -> SocketAddress? {
    // Documentation addresses belong to nobody, so only the default route leads to them.
    let target = SocketAddress(numeric: ipv6 ? "2001:db8::1" : "203.0.113.1", port: 9)
    if let target, let source = source(towards: target), !source.isLoopback, !source.isAny,
      !source.isLinkLocal
    {
      return source
    }
    return firstUsable(ipv6: ipv6)
  }

  /// The source address that a datagram to `target` would carry; port 0.
  private static func source(towards target: SocketAddress) -> SocketAddress? {
    let type = Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue)
    do throws(Errno) {
      let descriptor = try FileDescriptor(
        opening: { socket(target.family, type, 0) }, call: "socket")
      guard target.withPointer({ connect(descriptor.rawValue, $0, $1) }) == 0 else { return nil }
      var source = try SocketAddress.filled("getsockname") {
        getsockname(descriptor.rawValue, $0, $1)
      }
      source.port = 0
      return source
    } catch {
      return nil
    }
  }

  /// Every address that `firstUsable` chooses from, with the name of its interface.
  package static func usable(ipv6: Bool) -> [Entry] {
    all().filter { entry in
      entry.isUp && entry.isRunning && !entry.address.isLoopback && entry.name != "lo"
        && entry.address.isIPv6 == ipv6 && !entry.address.isLinkLocal
    }
  }

  /// Whether the host of `address` is this machine; true for all of 127.0.0.0/8.
  package static func owns(_ address: SocketAddress) -> Bool {
    if address.isLoopback { return true }
    if address.isAny { return false }
    let bytes = address.hostBytes
    return all().contains { $0.address.hostBytes == bytes }
  }
}

extension SocketAddress {
  /// The address in network order: 4 bytes for IPv4 (also if mapped into IPv6), else 16.
  package var hostBytes: [UInt8] {
    let bytes = withPointer { pointer, length in
      let raw = UnsafeRawBufferPointer(start: pointer, count: Int(length))
      return isIPv6 ? Array(raw[8..<24]) : Array(raw[4..<8])
    }
    let isMapped =
      bytes.count == 16 && bytes.prefix(10).allSatisfy { $0 == 0 } && bytes[10] == 0xFF
      && bytes[11] == 0xFF
    return isMapped ? Array(bytes.suffix(4)) : bytes
  }

  /// fe80::/10.
  package var isLinkLocal: Bool {
    let bytes = hostBytes
    return bytes.count == 16 && bytes[0] == 0xFE && bytes[1] & 0xC0 == 0x80
  }
}
