import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// The owner's side: shares the table of registrations and the memory files with processes of the
/// same user, and takes both back.
package final class SharedMemoryServer: MappableMemory, @unchecked Sendable {
  // Unchecked: the table is only written under `state`.

  /// Abstract socket name under which peers connect.
  package let name: String
  let socket: LocalSocket
  private let buffers: BufferTable
  private let table: SharedTable
  /// A word that peers read to see whether the kernel copies for them.
  private let probe: UnsafeMutablePointer<UInt64>

  private struct State: Sendable {
    var connections: [UInt64: SharedMemoryServerConnection] = [:]
    var memories: [UInt32: EngineMemory] = [:]
    /// What peers may map: whether writable.
    var offers: [UInt32: Bool] = [:]
    var nextMemory: UInt32 = 1
    var isStopped = false
  }
  private let state = Lock(State())

  private static let connectionLimit = 4096
  /// How long to wait for a peer that did not end a copy in time before.
  private static let lateMilliseconds: UInt64 = 20
  /// Each holds a descriptor open; further memory is ordinary memory to peers.
  private static let memoryLimit = 256

  /// A name under which peers can connect already.
  package final class Listener: Sendable {
    package let name: String
    fileprivate let socket: Lock<LocalSocket?>

    fileprivate init(name: String, socket: consuming LocalSocket) {
      self.name = name
      self.socket = Lock(socket)
    }
  }

  init(buffers: BufferTable, listener: Listener) throws(Errno) {
    guard let socket = listener.socket.withLock({ $0.take() }) else { throw Errno(EINVAL) }
    self.buffers = buffers
    self.socket = socket
    name = listener.name
    table = try SharedTable()
    probe = .allocate(capacity: 1)
    probe.initialize(to: .random(in: 1 ... .max))
  }

  deinit { probe.deallocate() }

  /// Listens under a name that nobody can guess; nil where the system has no such sockets.
  package static func listen() throws(Errno) -> Listener {
    func word() -> String {
      let digits = String(UInt64.random(in: 0 ... .max), radix: 16)
      return String(repeating: "0", count: 16 - digits.utf8.count) + digits
    }
    let name = "mooncake-" + word() + word()
    return Listener(name: name, socket: try LocalSocket.listening(on: name))
  }

  /// Peers that can reach the buffers, including this engine.
  package var connectionCount: Int { state.withLock { $0.connections.count } }

  // MARK: Registrations

  /// Allocates memory that peers can map; nil if there are too many such pieces already.
  package func allocate(byteCount: Int, node: UInt32?) -> EngineMemory? {
    let number: UInt32? = state.withLock { state in
      if state.isStopped || state.memories.count >= Self.memoryLimit { return nil }
      defer { state.nextMemory &+= 1 }
      return state.nextMemory
    }
    guard let number else { return nil }
    do throws(Errno) {
      let memory = try EngineMemory(sharing: number, byteCount: byteCount, node: node)
      state.withLock { $0.memories[number] = memory }
      return memory
    } catch {
      Log.debug("shared memory: \(byteCount) bytes: \(error); they will be ordinary memory")
      return nil
    }
  }

  /// Forgets memory that is about to be freed and no longer registered.
  package func release(_ memory: EngineMemory) {
    guard let number = memory.number else { return }
    state.withLock { $0.memories[number] = nil }
  }

  /// Publishes the current registrations to peers.
  package func publish() {
    state.withLock { state in
      if !state.isStopped { publish(&state) }
    }
  }

  /// Publishes the current registrations to peers and waits for copies that began before. Once it
  /// returns nil, no peer touches memory that is no longer registered; otherwise it names a thread
  /// that was still copying when the deadline passed or the wait was canceled.
  func revoke(until deadline: Deadline, unless isCanceled: () -> Bool) -> String? {
    let connections = state.withLock { state in
      if !state.isStopped { publish(&state) }
      table.changeGuard()
      return Array(state.connections.values)
    }
    return drain(connections, until: deadline, unless: isCanceled)
  }

  private func drain(
    _ connections: [SharedMemoryServerConnection], until deadline: Deadline,
    unless isCanceled: () -> Bool
  ) -> String? {
    var late: String?
    for connection in connections {
      // A peer that was late once must not delay every later call for the whole time.
      let shortened = Deadline.after(milliseconds: Self.lateMilliseconds)
      let end = connection.isLate ? min(deadline, shortened) : deadline
      if let thread = connection.drain(until: end, unless: isCanceled) {
        late = "thread \(thread) of process \(connection.processID)"
      }
    }
    return late
  }

  private func publish(_ state: inout State) {
    let buffers = self.buffers.buffers
    table.write(buffers)
    if state.memories.isEmpty && state.offers.isEmpty { return }
    var offers: [UInt32: Bool] = [:]
    for buffer in buffers where !buffer.range.access.isEmpty {
      guard let place = buffer.place else { continue }
      let isWritable = buffer.range.access.contains(.remoteWrite)
      offers[place.memory] = isWritable || offers[place.memory] ?? false
    }
    let old = state.offers
    state.offers = offers
    for connection in state.connections.values {
      for (memory, isWritable) in offers where old[memory] != isWritable {
        offer(memory, isWritable, to: connection, state)
      }
      for memory in old.keys where offers[memory] == nil {
        connection.send(.init(kind: SharedMemoryLayout.Notice.withdrawn, memory: memory))
      }
    }
  }

  private func offer(
    _ number: UInt32, _ isWritable: Bool, to connection: SharedMemoryServerConnection,
    _ state: State
  ) {
    let isOffered = state.memories[number]?.withDescriptor(writable: isWritable) { descriptor in
      let byteCount = UInt64(state.memories[number]?.mapping.count ?? 0)
      connection.send(
        .init(
          kind: SharedMemoryLayout.Notice.offered, memory: number, byteCount: byteCount,
          isWritable: isWritable ? 1 : 0),
        descriptor: descriptor)
    }
    if isOffered ?? false { return }
    // The peer uses kernel copies or TCP then. It must not keep a mapping with more rights, and it
    // expects a notice, because the greeting said how many follow.
    connection.send(.init(kind: SharedMemoryLayout.Notice.withdrawn, memory: number))
  }

  // MARK: The loop's thread

  /// Accepts a connection; returns it if its process may share memory.
  func admit(token: UInt64) throws(Errno) -> SharedMemoryServerConnection? {
    guard let accepted = try socket.accept() else { return nil }
    let peer = try accepted.credentials()
    guard peer.user == geteuid(), peer.process > 0 else {
      Log.info(
        "shared memory: refused process \(peer.process) of user \(peer.user)",
        about: String(peer.user))
      throw Errno(EPERM)
    }
    let slots = try MemoryFile(name: "mooncake-slots", byteCount: SharedMemoryLayout.slotsBytes)
    let connection = SharedMemoryServerConnection(
      socket: accepted, process: try ProcessHandle(peer.process), slots: try CopySlots(slots))
    let isAdmitted = state.withLock { state in
      if state.isStopped || state.connections.count >= Self.connectionLimit { return false }
      let greeting = SharedMemoryLayout.Greeting(
        probeAddress: UInt64(UInt(bitPattern: probe)), probeValue: probe.pointee,
        memoryCount: UInt64(state.offers.count))
      connection.greet(
        greeting, table: table.file.descriptor.rawValue, slots: slots.descriptor.rawValue)
      for (memory, isWritable) in state.offers {
        offer(memory, isWritable, to: connection, state)
      }
      state.connections[token] = connection
      return true
    }
    return isAdmitted ? connection : nil
  }

  /// Forgets a connection that its process has closed; false while a thread of it may still be
  /// copying, for which `revoke` must wait.
  func drop(token: UInt64) -> Bool {
    guard let connection = state.withLock({ $0.connections[token] }) else { return true }
    guard connection.hasStoppedCopying else { return false }
    state.withLock { $0.connections[token] = nil }
    return true
  }

  /// Takes everything back from all peers. Once it returns nil, no peer touches this process's
  /// memory; otherwise it names a thread that was still copying when the deadline passed.
  func stop(until deadline: Deadline) -> String? {
    let connections = state.withLock { state in
      state.isStopped = true
      table.write([])
      table.changeGuard()
      state.memories.removeAll()
      defer { state.connections.removeAll() }
      return Array(state.connections.values)
    }
    let late = drain(connections, until: deadline, unless: { false })
    for connection in connections { connection.hangUp() }
    return late
  }
}

/// A process that has the table mapped.
final class SharedMemoryServerConnection: Sendable {
  let socket: LocalSocket
  private let process: ProcessHandle
  private let slots: CopySlots
  private let wasLate = Atomic<Bool>(false)

  init(
    socket: consuming LocalSocket, process: consuming ProcessHandle, slots: consuming CopySlots
  ) {
    self.socket = socket
    self.process = process
    self.slots = slots
  }

  var processID: pid_t { process.id }

  /// Becomes readable when the process has ended.
  var processDescriptor: Int32 { process.rawDescriptor }

  /// Whether the process did not end its copies in time when it was last asked to.
  var isLate: Bool { wasLate.load(ordering: .relaxed) }

  /// Whether no thread of the process is copying and none will begin to.
  var hasStoppedCopying: Bool {
    // The slots are read last: a peer hangs up once it begins no more copies.
    process.hasEnded || socket.isHungUp && slots.areFree(process)
  }

  /// Waits until the copies that the process had begun are over; returns a thread that is still
  /// copying when the deadline has passed or the wait is canceled.
  func drain(until deadline: Deadline, unless isCanceled: () -> Bool) -> Int32? {
    let late = slots.drain(process, until: deadline, unless: isCanceled)
    // The wait was canceled: the copies may have been about to end.
    if late != nil && !deadline.hasPassed { return late }
    wasLate.store(late != nil, ordering: .relaxed)
    // A peer that was hung up on begins no more copies. Those of this process are its own engines.
    if late != nil && process.id != getpid() { hangUp() }
    return late
  }

  func greet(_ greeting: SharedMemoryLayout.Greeting, table: Int32, slots: Int32) {
    withUnsafeBytes(of: greeting) { send($0, descriptors: [table, slots]) }
  }

  func send(_ notice: SharedMemoryLayout.Notice, descriptor: Int32? = nil) {
    withUnsafeBytes(of: notice) { send($0, descriptors: descriptor.map { [$0] } ?? []) }
  }

  private func send(_ bytes: UnsafeRawBufferPointer, descriptors: [Int32]) {
    do throws(Errno) {
      try socket.send(bytes, descriptors: descriptors)
    } catch {
      // A peer that misses a notice would keep memory that was given back.
      Log.debug("shared memory: process \(process.id) does not listen: \(error)")
      hangUp()
    }
  }

  /// Makes the peer use TCP. It hangs up in turn once it has noticed; until then it may begin
  /// further copies.
  func hangUp() { _ = shutdown(socket.rawValue, Int32(SHUT_WR)) }
}
