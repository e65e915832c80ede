import CLinux
import MooncakeBase
import MooncakeSystem
import Synchronization

/// The thread that greets peers, reads their notices and notices when they leave. Copies never wait
/// for it.
final class SharedMemoryLoop: @unchecked Sendable {
  // Unchecked: `thread` is written once before the loop is shared; the rest is synchronized or used
  // by the thread only.
  private enum Member {
    case connection(SharedMemoryServerConnection)
    case peer(SharedMemoryPeer)
  }

  private struct State: Sendable {
    var members: [UInt64: Member] = [:]
    var nextToken: UInt64 = 2
  }

  private let server: SharedMemoryServer
  private let epoll: Epoll
  private let wakeup: EventFD
  private let state = Lock(State())
  private let isStopping = Atomic<Bool>(false)
  private var thread: WorkerThread?
  /// Connections that were closed, by either side, while their processes may still copy. Used by
  /// the thread only.
  private var leaving: [UInt64] = []
  private var checkMilliseconds = SharedMemoryLoop.firstCheckMilliseconds

  private static let wakeupToken: UInt64 = 0
  private static let listenerToken: UInt64 = 1
  private static let eventCount = 64
  /// The pause between two checks of peers that hung up in the middle of a copy: at first and at
  /// most.
  private static let firstCheckMilliseconds: Int32 = 1
  private static let checkLimitMilliseconds: Int32 = 1000
  /// How long accepting rests when the process is out of descriptors or memory.
  private static let restNanoseconds: UInt64 = 50_000_000

  init(server: SharedMemoryServer) throws(Errno) {
    self.server = server
    epoll = try Epoll()
    wakeup = try EventFD()
    try epoll.add(wakeup.descriptor.rawValue, events: Epoll.readable, token: Self.wakeupToken)
    try epoll.add(server.socket.rawValue, events: Epoll.readable, token: Self.listenerToken)
    thread = try WorkerThread.start(name: "mc-shm") { [unowned self] in run() }
  }

  /// Joins the thread; idempotent.
  func stop() {
    if isStopping.exchange(true, ordering: .sequentiallyConsistent) { return }
    wakeup.signal()
    thread?.join()
  }

  /// Watches a peer until it leaves or is forgotten. The reference is strong, because weak ones
  /// would slow down every use of the peer.
  func watch(_ peer: SharedMemoryPeer) throws(Errno) {
    let token = add(.peer(peer))
    peer.token.store(token, ordering: .relaxed)
    do throws(Errno) {
      try epoll.add(peer.socket.rawValue, events: Epoll.readable, token: token)
      try epoll.add(peer.process.rawDescriptor, events: Epoll.readable, token: token)
    } catch {
      remove(token)
      throw error
    }
  }

  /// Stops watching a peer; copies under way keep it alive.
  func forget(_ peer: SharedMemoryPeer) {
    remove(peer.token.load(ordering: .relaxed))
    epoll.remove(peer.socket.rawValue)
    epoll.remove(peer.process.rawDescriptor)
  }

  private func add(_ member: Member) -> UInt64 {
    state.withLock { state in
      let token = state.nextToken
      state.nextToken += 1
      state.members[token] = member
      return token
    }
  }

  private func remove(_ token: UInt64) { state.withLock { $0.members[token] = nil } }

  private func run() {
    let events = UnsafeMutableBufferPointer<epoll_event>.allocate(capacity: Self.eventCount)
    defer { events.deallocate() }
    while !isStopping.load(ordering: .sequentiallyConsistent) {
      let count = epoll.wait(
        into: events, timeoutMilliseconds: leaving.isEmpty ? -1 : checkMilliseconds)
      leaving.removeAll(where: drop)
      checkMilliseconds = min(2 * checkMilliseconds, Self.checkLimitMilliseconds)
      for index in 0..<count {
        let token = events[index].data.u64
        switch token {
        case Self.wakeupToken: wakeup.clear()
        case Self.listenerToken: accept()
        default: handle(token)
        }
      }
    }
  }

  private func accept() {
    let token = state.withLock { state in
      defer { state.nextToken += 1 }
      return state.nextToken
    }
    do throws(Errno) {
      guard let connection = try server.admit(token: token) else { return }
      state.withLock { $0.members[token] = .connection(connection) }
      do throws(Errno) {
        try epoll.add(connection.socket.rawValue, events: Epoll.readable, token: token)
        try epoll.add(connection.processDescriptor, events: Epoll.readable, token: token)
      } catch {
        end(connection, token)
        throw error
      }
    } catch {
      Log.debug("shared memory: accepting a peer: \(error)")
      if error.rawValue == EMFILE || error.rawValue == ENFILE || error.rawValue == ENOMEM {
        sleepBriefly(nanoseconds: Self.restNanoseconds)
      }
    }
  }

  private func handle(_ token: UInt64) {
    guard let member = state.withLock({ $0.members[token] }) else { return }
    switch member {
    case .connection(let connection):
      // A peer never sends: whatever happened is its end.
      end(connection, token)
    case .peer(let peer):
      if peer.checkAlive() { peer.receiveNotices() }
      if !peer.isUsable { forget(peer) }
    }
  }

  private func end(_ connection: SharedMemoryServerConnection, _ token: UInt64) {
    connection.hangUp()
    epoll.remove(connection.socket.rawValue)
    epoll.remove(connection.processDescriptor)
    if drop(token) { return }
    leaving.append(token)
    checkMilliseconds = Self.firstCheckMilliseconds
  }

  /// Forgets a connection unless its process may be in the middle of a copy.
  private func drop(_ token: UInt64) -> Bool {
    if !server.drop(token: token) { return false }
    remove(token)
    return true
  }
}
