import MooncakeBase
import MooncakeSystem

/// What the native API's engine options say about addresses.
package struct ListenOptions: Sendable {
  /// Numeric; "0.0.0.0" and "::" mean every interface.
  package var bindAddress: String?
  /// The name or address that peers connect to.
  package var advertisedAddress: String?
  /// 0: the system chooses.
  package var port: UInt16 = 0
  /// The segment name.
  package var name: String?
  /// Whether peers get the address from a metadata service, so that the name need not be one.
  package var usesMetadataService = false

  package init() {}
}

extension ListenAddress {
  /// Opens the RPC listener as the native API promises: exactly where asked, or an error.
  package static func open(
    _ options: ListenOptions, settings: HandshakeSettings = .fromEnvironment(),
    deadline: Deadline = .after(milliseconds: 5000)
  ) throws(MooncakeError) -> OpenedListener {
    var port = options.port
    if port == 0, !options.usesMetadataService, let name = options.name {
      // Without a metadata service a name contains the port, so it asks for that port.
      port = (try? HostPort(parsing: name))?.port ?? 0
    }
    let advertised = try options.advertisedAddress.map { text throws(MooncakeError) in
      try parseHost(text, option: "advertised_address")
    }
    let target = try bindAddress(options.bindAddress, advertised, port: port, deadline: deadline)
    let listener = try openListener(on: target, backlog: settings.backlog)
    let bound = try boundAddress(of: listener)
    let host = advertised ?? defaultHost(for: bound)
    let natural = HostPort(host: host, port: bound.port).description
    if let name = options.name, name != natural, !options.usesMetadataService {
      throw MooncakeError(
        .invalidArgument,
        "name \(String(reflecting: String(name.prefix(100)))): without a metadata service peers "
          + "connect to the name itself, which would be \(natural): give that or none")
    }
    return OpenedListener(
      listener: listener,
      address: ListenAddress(
        bound: bound, advertisedHost: host, name: options.name ?? natural, dataPorts: nil))
  }

  private static func bindAddress(
    _ text: String?, _ advertised: String?, port: UInt16, deadline: Deadline
  ) throws(MooncakeError) -> SocketAddress {
    if let text {
      let host = try parseHost(text, option: "bind_address")
      guard let address = SocketAddress(numeric: host, port: port) else {
        throw MooncakeError(
          .invalidArgument,
          "bind_address \(host) is not a numeric address: give one, such as 10.0.0.5 or ::")
      }
      return address
    }
    let addresses: [SocketAddress]
    do throws(ResolveError) {
      addresses = try Resolver.resolve(
        advertised ?? "127.0.0.1", port: port, deadline: deadline)
    } catch {
      throw MooncakeError(
        .unresolved,
        "advertised_address \(advertised ?? ""): \(error): correct the name, or give bind_address "
          + "too")
    }
    guard let own = preferred(addresses.filter { NetworkInterfaces.owns($0) || $0.isAny }) else {
      throw MooncakeError(
        .invalidArgument,
        "advertised_address \(advertised ?? "") is not an address of this machine: give "
          + "bind_address too, such as 0.0.0.0, if peers reach it through address translation")
    }
    return own
  }

  private static func defaultHost(for bound: SocketAddress) -> String {
    if !bound.isAny { return bound.host }
    let address = advertisedAddress(
      ipv6: bound.isIPv6, remedy: "advertised_address chooses another")
    return address?.host ?? (bound.isIPv6 ? "::1" : "127.0.0.1")
  }

  private static func parseHost(
    _ text: String, option: String
  ) throws(MooncakeError) -> String {
    do throws(HostPortError) {
      let parsed = try HostPort(parsing: text)
      if parsed.port == nil { return parsed.host }
    } catch {
      throw MooncakeError(
        .invalidArgument,
        "\(option) \(String(reflecting: String(text.prefix(100)))) is not a host: \(error)")
    }
    throw MooncakeError(
      .invalidArgument, "\(option) \(text) contains a port: give the port in its own option")
  }

  /// Prefers addresses that peers can use to the loopback, and IPv4 to IPv6.
  static func preferred(_ addresses: [SocketAddress], ipv6: Bool = false) -> SocketAddress? {
    func rank(_ address: SocketAddress) -> Int {
      (address.isLoopback ? 2 : 0) + (address.isIPv6 == ipv6 ? 0 : 1)
    }
    return addresses.min { rank($0) < rank($1) }
  }
}
