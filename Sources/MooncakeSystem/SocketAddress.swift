import CLinux
import Glibc

/// A numeric IPv4 or IPv6 address with a port.
package struct SocketAddress: Equatable, Sendable, CustomStringConvertible {
  private var storage: sockaddr_storage
  package let length: socklen_t

  package init(_ pointer: UnsafePointer<sockaddr>, length: socklen_t) {
    storage = sockaddr_storage()
    let bytes = min(Int(length), MemoryLayout<sockaddr_storage>.size)
    withUnsafeMutableBytes(of: &storage) {
      $0.copyMemory(from: UnsafeRawBufferPointer(start: pointer, count: bytes))
    }
    self.length = socklen_t(bytes)
  }

  /// Parses a numeric address such as "10.0.0.5", "::1" or "fe80::1%eth0"; nil if it is not one.
  package init?(numeric host: String, port: UInt16) {
    var hints = addrinfo()
    hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV
    hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
    var list: UnsafeMutablePointer<addrinfo>?
    guard getaddrinfo(host, String(port), &hints, &list) == 0, let first = list else { return nil }
    defer { freeaddrinfo(first) }
    self.init(first.pointee.ai_addr, length: first.pointee.ai_addrlen)
  }

  package var family: Int32 { Int32(storage.ss_family) }
  package var isIPv6: Bool { family == AF_INET6 }

  package var port: UInt16 {
    get { UInt16(bigEndian: portField { $0.pointee }) }
    set { mutablePortField { $0.pointee = newValue.bigEndian } }
  }

  // Both families keep the port in bytes 2 and 3.
  private func portField(_ body: (UnsafePointer<UInt16>) -> UInt16) -> UInt16 {
    withUnsafeBytes(of: storage) {
      body(($0.baseAddress! + 2).assumingMemoryBound(to: UInt16.self))
    }
  }
  private mutating func mutablePortField(_ body: (UnsafeMutablePointer<UInt16>) -> Void) {
    withUnsafeMutableBytes(of: &storage) {
      body(($0.baseAddress! + 2).assumingMemoryBound(to: UInt16.self))
    }
  }

  /// The numeric host without brackets.
  package var host: String {
    withPointer { address, length in
      var text = [CChar](repeating: 0, count: Int(NI_MAXHOST))
      let result = getnameinfo(
        address, length, &text, socklen_t(text.count), nil, 0, NI_NUMERICHOST)
      return result == 0 ? text.withUnsafeBufferPointer { String(cString: $0.baseAddress!) } : "?"
    }
  }

  /// The part of the address that its owner cannot easily change: the /64 network for IPv6, else
  /// the host.
  package var networkOrHost: String {
    guard isIPv6 else { return host }
    return withUnsafeBytes(of: storage) { bytes in
      // An IPv4 address mapped into IPv6.
      let isMapped = bytes[8..<18].allSatisfy { $0 == 0 } && bytes[18] == 0xFF && bytes[19] == 0xFF
      return isMapped ? host : String(decoding: hexadecimal(bytes[8..<16]), as: UTF8.self)
    }
  }

  private func hexadecimal(_ bytes: Slice<UnsafeRawBufferPointer>) -> [UInt8] {
    let digits = Array("0123456789abcdef".utf8)
    return bytes.flatMap { [digits[Int($0 >> 4)], digits[Int($0 & 15)]] }
  }

  /// "host:port", IPv6 hosts in brackets.
  package var description: String { isIPv6 ? "[\(host)]:\(port)" : "\(host):\(port)" }

  /// 127.0.0.0/8, ::1 or an IPv4 loopback address mapped into IPv6.
  package var isLoopback: Bool {
    withUnsafeBytes(of: storage) { bytes in
      if family == AF_INET { return bytes[4] == 127 }
      guard isIPv6 else { return false }
      let address = bytes[8..<24]
      if address.dropLast().allSatisfy({ $0 == 0 }) { return address.last == 1 }
      return address.prefix(10).allSatisfy { $0 == 0 }
        && bytes[18] == 0xFF && bytes[19] == 0xFF && bytes[20] == 127
    }
  }

  /// 0.0.0.0 or ::.
  package var isAny: Bool {
    withUnsafeBytes(of: storage) { bytes in
      family == AF_INET ? bytes[4..<8].allSatisfy { $0 == 0 } : bytes[8..<24].allSatisfy { $0 == 0 }
    }
  }

  package func withPointer<Result>(
    _ body: (UnsafePointer<sockaddr>, socklen_t) -> Result
  ) -> Result {
    withUnsafePointer(to: storage) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, length) }
    }
  }

  /// Lets a system call fill an address.
  package static func filled(
    _ name: StaticString,
    by call: (UnsafeMutablePointer<sockaddr>, UnsafeMutablePointer<socklen_t>) -> Int32
  ) throws(Errno) -> SocketAddress {
    var storage = sockaddr_storage()
    var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
    let result = withUnsafeMutablePointer(to: &storage) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { call($0, &length) }
    }
    if result != 0 { throw Errno(errno, call: name) }
    return withUnsafePointer(to: storage) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        SocketAddress($0, length: length)
      }
    }
  }

  package static func == (left: SocketAddress, right: SocketAddress) -> Bool {
    left.length == right.length
      && withUnsafeBytes(of: left.storage) { a in
        withUnsafeBytes(of: right.storage) { b in
          a.prefix(Int(left.length)).elementsEqual(b.prefix(Int(right.length)))
        }
      }
  }
}
