import CLinux
import Glibc
import Synchronization

/// Why a host name gave no address.
package struct ResolveError: Error, Equatable, Sendable, CustomStringConvertible {
  package let isTimeout: Bool
  /// Whether the caller gave up.
  package let isCanceled: Bool
  /// The resolver's own words, such as "Name or service not known".
  package let description: String

  package init(isTimeout: Bool, isCanceled: Bool = false, description: String) {
    self.isTimeout = isTimeout
    self.isCanceled = isCanceled
    self.description = description
  }
}

/// Resolves host names within a deadline.
///
/// `getaddrinfo` cannot be interrupted, so it runs on its own thread, which is left behind if the
/// deadline passes or the caller gives up first. A fixed number of slots bounds these threads.
package enum Resolver {
  /// Lookups that may run at once, including those left behind; others wait for a slot.
  package static let maximumLookups = 16

  package typealias Lookup =
    @Sendable (_ host: String, _ port: UInt16) -> Result<[SocketAddress], ResolveError>

  /// Addresses of a host in the system's order of preference, at least one. Gives up once
  /// `cancellation` is readable.
  package static func resolve(
    _ host: String, port: UInt16, deadline: Deadline, cancellation: Int32 = -1
  ) throws(ResolveError) -> [SocketAddress] {
    if let address = SocketAddress(numeric: host, port: port) { return [address] }
    return try resolve(
      host, port: port, deadline: deadline, cancellation: cancellation, lookup: systemLookup)
  }

  /// As above, with another source of addresses.
  package static func resolve(
    _ host: String, port: UInt16, deadline: Deadline, cancellation: Int32 = -1,
    lookup: @escaping Lookup
  ) throws(ResolveError) -> [SocketAddress] {
    let slots = Self.slots
    let patience = Patience(deadline: deadline, cancellation: cancellation)
    try slots.acquire(patience)
    let answer = Answer()
    do {
      try WorkerThread.startDetached(name: "mc-resolve") {
        answer.set(lookup(host, port))
        slots.release()
      }
    } catch {
      slots.release()
      throw ResolveError(isTimeout: false, description: "cannot start a thread: \(error)")
    }
    return try answer.wait(patience).get()
  }

  // Replaced only in a forked child, before it has a second thread: the parent's lookups do not
  // exist there.
  private nonisolated(unsafe) static var slots: LookupSlots = {
    Fork.inChild { slots = LookupSlots(count: maximumLookups) }
    return LookupSlots(count: maximumLookups)
  }()

  /// Uses the globals once, as `Fork.prepare` asks for it.
  static func prepare() { _ = slots }

  private static let systemLookup: Lookup = { host, port in
    var hints = addrinfo()
    hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
    var list: UnsafeMutablePointer<addrinfo>?
    FileDescriptor.fillStandard()
    let result = getaddrinfo(host, String(port), &hints, &list)
    if result != 0 {
      let text =
        result == EAI_SYSTEM ? Errno.current.description : String(cString: gai_strerror(result))
      return .failure(ResolveError(isTimeout: false, description: text))
    }
    defer { freeaddrinfo(list) }
    var addresses: [SocketAddress] = []
    var next = list
    while let entry = next {
      if let pointer = entry.pointee.ai_addr {
        let address = SocketAddress(pointer, length: entry.pointee.ai_addrlen)
        if !addresses.contains(address) { addresses.append(address) }
      }
      next = entry.pointee.ai_next
    }
    if addresses.isEmpty {
      return .failure(ResolveError(isTimeout: false, description: "the name has no address"))
    }
    return .success(addresses)
  }
}

/// How long a caller waits.
private struct Patience {
  let deadline: Deadline
  let cancellation: Int32

  private static let tickMilliseconds: UInt64 = 50

  /// When to check `cancellation` again: a futex cannot also wait for a descriptor.
  var tick: Deadline {
    cancellation < 0 ? deadline : min(deadline, .after(milliseconds: Self.tickMilliseconds))
  }

  /// The error to throw if the caller must stop waiting; `reason` says what it waited for.
  func end(_ reason: String) -> ResolveError? {
    if Waiting.isReadable(cancellation) {
      return ResolveError(isTimeout: false, isCanceled: true, description: "given up")
    }
    return deadline.hasPassed ? ResolveError(isTimeout: true, description: reason) : nil
  }
}

/// Where a lookup thread leaves its result; the caller may already have given up.
private final class Answer: Sendable {
  private let result = Lock<Result<[SocketAddress], ResolveError>?>(nil)
  private let ready = Futex()

  func set(_ value: Result<[SocketAddress], ResolveError>) {
    result.withLock { $0 = value }
    ready.store(1)
    ready.wakeAll()
  }

  func wait(_ patience: Patience) -> Result<[SocketAddress], ResolveError> {
    while true {
      if let value = result.withLock({ $0 }) { return value }
      if let error = patience.end("the name service did not answer in time") {
        return .failure(error)
      }
      ready.wait(while: 0, until: patience.tick)
    }
  }
}

/// A counting semaphore with a deadline.
private final class LookupSlots: Sendable {
  private let free: Lock<Int>
  private let releases = Futex()

  init(count: Int) { free = Lock(count) }

  func acquire(_ patience: Patience) throws(ResolveError) {
    while true {
      // Read before the check, so that a release in between makes the wait below return at once.
      let seen = releases.value
      let taken = free.withLock { count in
        if count == 0 { return false }
        count -= 1
        return true
      }
      if taken { return }
      if let error = patience.end("earlier lookups still wait for the name service") {
        throw error
      }
      releases.wait(while: seen, until: patience.tick)
    }
  }

  func release() {
    free.withLock { $0 += 1 }
    releases.increment()
    releases.wakeAll()
  }
}
