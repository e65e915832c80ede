import CLinux
import MooncakeBase
import MooncakeSystem

/// The arguments of `createTransferEngine` that say where to listen.
package struct DropInListenOptions: Sendable {
  /// `local_server_name`.
  package var serverName: String
  /// `ip_or_host_name`: used if the server name has no host.
  package var hostName: String?
  /// `rpc_port`: used if the server name has no port; 0 or above 65535 means none.
  package var port: UInt64 = 0
  /// Whether peers get the address from a metadata service; otherwise the name is the address.
  package var usesStore = false

  package init(serverName: String) { self.serverName = serverName }
}

extension ListenAddress {
  /// Opens the RPC listener as programs written for Mooncake expect: on the wanted port if it is
  /// free, else on another, and without failing because of the advertised name.
  package static func open(
    _ options: DropInListenOptions, settings: HandshakeSettings = .fromEnvironment(),
    deadline: Deadline = .after(milliseconds: 5000)
  ) throws(MooncakeError) -> OpenedListener {
    let given = try parse(options)
    let usesNameAsHost = !options.usesStore || settings.isLegacyPortBinding
    let host: String
    if usesNameAsHost {
      host = given.host
    } else {
      host =
        settings.advertisedAddress
        ?? advertisedAddress(
          ipv6: settings.usesIPv6, remedy: "MC_TCP_BIND_ADDRESS chooses another")?.host
        ?? given.host
    }
    let target = bindAddress(for: host, settings: settings, deadline: deadline)
    var wish = given.port ?? 0
    if wish == 0, options.usesStore, settings.isLegacyPortBinding { wish = settings.defaultPort }
    let listener = try listen(on: target, wish: wish, settings: settings)
    let bound = try boundAddress(of: listener)
    let name =
      options.usesStore
      ? options.serverName : HostPort(host: host, port: bound.port).description
    return OpenedListener(
      listener: listener,
      address: ListenAddress(
        bound: bound, advertisedHost: host, name: name, dataPorts: settings.portRange))
  }

  private static func parse(_ options: DropInListenOptions) throws(MooncakeError) -> HostPort {
    let argument = UInt16(exactly: options.port) ?? 0
    do throws(HostPortError) {
      // A malformed port becomes 0, which means none.
      var parsed = try HostPort(parsing: options.serverName, defaultPort: 0)
      if parsed.port == 0 { parsed.port = argument }
      return parsed
    } catch {
      if options.serverName.isEmpty, let host = options.hostName,
        let parsed = try? HostPort(parsing: host)
      {
        return HostPort(host: parsed.host, port: argument)
      }
      throw MooncakeError(
        .invalidArgument,
        "local_server_name \(String(reflecting: String(options.serverName.prefix(100)))) is "
          + "neither a host nor host:port: \(error)")
    }
  }

  /// The advertised address if it belongs to this machine, else the any-address.
  private static func bindAddress(
    for host: String, settings: HandshakeSettings, deadline: Deadline
  ) -> SocketAddress {
    let numeric = SocketAddress(numeric: host, port: 0)
    let reason: String
    if let numeric {
      if numeric.isAny || NetworkInterfaces.owns(numeric) { return numeric }
      reason = "is not an address of this machine"
    } else {
      do throws(ResolveError) {
        let addresses = try Resolver.resolve(host, port: 0, deadline: deadline)
        let own = preferred(
          addresses.filter { NetworkInterfaces.owns($0) }, ipv6: settings.usesIPv6)
        // Many machines resolve their own name to the loopback, where peers could not reach them.
        if let own, !own.isLoopback || isLocalhost(host) { return own }
        reason =
          own == nil
          ? "resolves to no address of this machine" : "resolves here to the loopback only"
      } catch {
        reason = "cannot be resolved here (\(error))"
      }
    }
    let usesIPv6 = numeric?.isIPv6 ?? settings.usesIPv6
    Log.warning(
      "advertised name \(host) \(reason); listening on every interface. To listen on one only, "
        + "advertise its address")
    return SocketAddress(numeric: usesIPv6 ? "::" : "0.0.0.0", port: 0)!
  }

  private static func isLocalhost(_ host: String) -> Bool {
    let name = host.lowercased()
    return name == "localhost" || name.hasPrefix("localhost.") || name.hasSuffix(".localhost")
      || name.hasPrefix("ip6-l")
  }

  private static func listen(
    on target: SocketAddress, wish: UInt16, settings: HandshakeSettings
  ) throws(MooncakeError) -> Socket {
    if wish != 0 {
      var address = target
      address.port = wish
      do throws(Errno) {
        return try Socket.listening(on: address, backlog: settings.backlog)
      } catch {
        if error.rawValue != EADDRINUSE && error.rawValue != EACCES {
          throw listenFailure(error, address)
        }
        Log.info("listen on \(address): \(error); choosing another port")
      }
    }
    return try PortSearch(address: target, range: settings.portRange, backlog: settings.backlog)
      .open()
  }
}
