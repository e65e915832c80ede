import CLinux
import MooncakeBase
import MooncakeSystem

/// Where an engine listens and the name by which peers find it.
package struct ListenAddress: Sendable {
  /// The RPC listener's address with its real port.
  package let bound: SocketAddress
  /// The host that peers connect to, without brackets.
  package let advertisedHost: String
  /// The segment name.
  package let name: String
  /// The range for the data port; nil lets the system choose.
  let dataPorts: ClosedRange<UInt16>?

  /// The RPC port.
  package var port: UInt16 { bound.port }

  /// Opens the data listener: same address, another port.
  package func openDataListener() throws(MooncakeError) -> Socket {
    var address = bound
    if let dataPorts {
      return try PortSearch(address: address, range: dataPorts, backlog: Self.dataBacklog).open()
    }
    address.port = 0
    return try openListener(on: address, backlog: Self.dataBacklog)
  }

  private static let dataBacklog: Int32 = 1024
}

/// A listening RPC socket with its address.
package struct OpenedListener: ~Copyable {
  package let listener: Socket
  package let address: ListenAddress

  /// Gives the socket to the caller.
  package consuming func takeListener() -> Socket { listener }
}

/// Finds a free port in a range, starting at a random one so that processes rarely collide.
struct PortSearch {
  var address: SocketAddress
  let range: ClosedRange<UInt16>
  let backlog: Int32

  func open() throws(MooncakeError) -> Socket {
    var address = address
    let start = Int.random(in: 0..<range.count)
    for step in 0..<range.count {
      address.port = range.lowerBound + UInt16((start + step) % range.count)
      do throws(Errno) {
        return try Socket.listening(on: address, backlog: backlog)
      } catch {
        if error.rawValue != EADDRINUSE { throw listenFailure(error, address) }
      }
    }
    throw MooncakeError(
      .addressInUse,
      "every port from \(range.lowerBound) to \(range.upperBound) is taken on \(address.host): "
        + "widen the range with MC_MIN_RPC_PORT and MC_MAX_RPC_PORT")
  }
}

/// The address to give to peers when listening on every interface; nil if there is only the
/// loopback. `remedy` says how to choose another.
func advertisedAddress(ipv6: Bool, remedy: String) -> SocketAddress? {
  let family = [ipv6, false].first { NetworkInterfaces.outgoing(ipv6: $0) != nil }
  guard let family, let chosen = NetworkInterfaces.outgoing(ipv6: family) else { return nil }
  let others = NetworkInterfaces.usable(ipv6: family).filter {
    $0.address.hostBytes != chosen.hostBytes
  }
  if !others.isEmpty {
    let names = others.prefix(8).map { "\($0.address.host) (\($0.name))" }
    Log.warning(
      "listening on every interface; peers are told \(chosen.host), the address of the default "
        + "route, and not \(names.joined(separator: ", ")): \(remedy)")
  }
  return chosen
}

/// Listens on an address; errors say what to do.
func openListener(
  on address: SocketAddress, backlog: Int32
) throws(MooncakeError) -> Socket {
  do throws(Errno) {
    return try Socket.listening(on: address, backlog: backlog)
  } catch {
    throw listenFailure(error, address)
  }
}

/// The address a socket is bound to, with its real port.
func boundAddress(of socket: borrowing Socket) throws(MooncakeError) -> SocketAddress {
  do throws(Errno) {
    return try socket.localAddress()
  } catch {
    throw MooncakeError(.system, "cannot read the address of a listener: \(error)")
  }
}

/// Says why a listener could not be opened and what to do.
func listenFailure(_ error: Errno, _ address: SocketAddress) -> MooncakeError {
  switch error.rawValue {
  case EADDRINUSE:
    return MooncakeError(
      .addressInUse,
      "listen on \(address): port \(address.port) is taken by another socket: end its process, "
        + "choose another port, or give port 0 to let the system choose")
  case EADDRNOTAVAIL:
    return MooncakeError(
      .invalidArgument,
      "listen on \(address): not an address of this machine: give one of its own, or bind 0.0.0.0 "
        + "or :: and advertise this one")
  case EACCES:
    return MooncakeError(
      .system, "listen on \(address): \(error): ports below 1024 need privileges; choose another")
  default: return MooncakeError(.system, "listen on \(address): \(error)")
  }
}
