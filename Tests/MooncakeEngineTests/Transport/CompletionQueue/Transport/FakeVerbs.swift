import CLinux
import Glibc
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// A table of functions with the shape of verbs: devices, keys, queue pairs, completions. A thread
/// for each device moves the bytes, between any two processes that the kernel lets copy.
package final class FakeVerbs: Sendable {
  package let table: FakeTable
  package let devices: [FakeDevice]
  package let completions = CompletionQueue()

  package init(deviceCount: Int) throws(Errno) {
    let table = try FakeTable()
    self.table = table
    devices = (0..<deviceCount).map {
      [completions] in FakeDevice(index: $0, table: table, completions: completions)
    }
    do throws(Errno) {
      for device in devices { try device.start() }
    } catch {
      stop()
      throw error
    }
  }

  /// Makes a range known to a device. The keys are 0 if it cannot be.
  package func registerRegion(
    _ address: UInt64, _ length: UInt64, _ rights: Access, on device: Int
  ) -> (localKey: UInt32, remoteKey: UInt32) {
    let key = table.register(address, length, rights, device: device)
    return (key, key)
  }

  /// Ends the threads; what is posted is flushed.
  package func stop() { for device in devices { device.stop() } }
}

/// What a device is asked to do.
package struct WorkRequest: @unchecked Sendable {
  // Unchecked: the memory belongs to the request until its completion.
  package var id: UInt64
  package var pair: FakeQueuePair
  package var opcode: Opcode
  package var local: UnsafeMutableRawPointer
  package var localKey: UInt32
  package var remote: UInt64
  package var remoteKey: UInt32
  package var length: Int

  package init(
    id: UInt64, pair: FakeQueuePair, opcode: Opcode, local: UnsafeMutableRawPointer,
    localKey: UInt32, remote: UInt64, remoteKey: UInt32, length: Int
  ) {
    self.id = id
    self.pair = pair
    self.opcode = opcode
    self.local = local
    self.localKey = localKey
    self.remote = remote
    self.remoteKey = remoteKey
    self.length = length
  }
}

/// How a work request ended.
package struct WorkCompletion: Sendable {
  package enum Status: Sendable {
    case success
    /// The queue pair was in error before it was the request's turn, or in the middle of it.
    case flushed
    case localProtection
    case remoteAccess
    case remoteOperation
    /// No answer from the peer's device.
    case retryExceeded
  }
  package var id: UInt64
  package var pair: FakeQueuePair
  package var status: Status
}

/// This side of a connection between two devices.
package final class FakeQueuePair: Sendable {
  package let device: FakeDevice
  package let peer: FakeTable
  /// The other side.
  package let peerNumber: UInt64
  package let peerDevice: Int
  private let ready = Atomic<Bool>(true)

  fileprivate init(_ device: FakeDevice, _ peer: FakeTable, _ number: UInt64, _ peerDevice: Int) {
    self.device = device
    self.peer = peer
    peerNumber = number
    self.peerDevice = peerDevice
  }

  package var isReady: Bool { ready.load(ordering: .acquiring) }

  /// Puts it into the error state: everything posted is flushed.
  package func fail() { ready.store(false, ordering: .releasing) }
}

/// Completions of all queue pairs of an engine.
package final class CompletionQueue: Sendable {
  private let waiting = Lock<[WorkCompletion]>([])
  private let count = Atomic<Int>(0)
  private let listener = Lock<(@Sendable () -> Void)?>(nil)

  package var isEmpty: Bool { count.load(ordering: .sequentiallyConsistent) == 0 }

  package func setListener(_ body: @escaping @Sendable () -> Void) {
    listener.withLock { $0 = body }
  }

  package func takeAll() -> [WorkCompletion] {
    waiting.withLock { waiting in
      defer { waiting = [] }
      count.store(0, ordering: .sequentiallyConsistent)
      return waiting
    }
  }

  fileprivate func append(_ completion: WorkCompletion) {
    waiting.withLock {
      $0.append(completion)
      count.store($0.count, ordering: .sequentiallyConsistent)
    }
    listener.withLock { $0 }?()
  }
}

/// A NIC: executes what is posted, in order.
package final class FakeDevice: @unchecked Sendable {
  // Unchecked: `thread` is set before the device is shared; the rest is synchronized.
  package let index: Int
  private let table: FakeTable
  private let completions: CompletionQueue
  private let queue = Lock<[WorkRequest]>([])
  private let late = Lock<[WorkRequest]>([])
  private let bell = Futex()
  private let isStopping = Atomic<Bool>(false)
  private let moved = Atomic<UInt64>(0)
  private let linkIsUp = Atomic<Bool>(true)
  private let isPaused = Atomic<Bool>(false)
  private let answersToLose = Atomic<Int>(0)
  private var thread: WorkerThread?

  private static let pieceBytes = 256 << 10

  init(index: Int, table: FakeTable, completions: CompletionQueue) {
    self.index = index
    self.table = table
    self.completions = completions
  }

  /// Bytes that have been moved.
  package var movedBytes: UInt64 { moved.load(ordering: .relaxed) }

  package func post(_ request: WorkRequest) {
    queue.withLock { $0.append(request) }
    bell.increment()
    bell.wakeAll()
  }

  /// Connects with a device of an engine; nil if that cannot be reached.
  package func connect(to peer: FakeTable, device: Int) -> FakeQueuePair? {
    guard isUp, !isStopping.load(ordering: .acquiring), let number = peer.connectQueuePair() else {
      return nil
    }
    return FakeQueuePair(self, peer, number, device)
  }

  fileprivate func start() throws(Errno) {
    thread = try WorkerThread.start(name: "fake-nic\(index)") { [unowned self] in run() }
  }

  fileprivate func stop() {
    isStopping.store(true, ordering: .sequentiallyConsistent)
    bell.increment()
    bell.wakeAll()
    thread?.join()
    thread = nil
  }
}

// MARK: - Faults

extension FakeDevice {
  /// Whether the cable is plugged in. Without it every request fails.
  package var isUp: Bool {
    get { linkIsUp.load(ordering: .acquiring) }
    set { linkIsUp.store(newValue, ordering: .releasing) }
  }

  /// Keeps what is posted waiting.
  package func pause(_ pauses: Bool) {
    isPaused.store(pauses, ordering: .sequentiallyConsistent)
    bell.increment()
    bell.wakeAll()
  }

  /// The data of the next writes stays in the fabric, and they fail as not answered.
  package func loseAnswers(_ count: Int) { answersToLose.store(count, ordering: .releasing) }

  package var lateCount: Int { late.withLock { $0.count } }

  /// Lets the fabric deliver what it kept; returns how much of it the peer's side took.
  package func deliverLate() -> Int {
    let requests = late.withLock { late in
      defer { late = [] }
      return late
    }
    return requests.count { execute($0, isLate: true) == .success }
  }
}

// MARK: - The thread

extension FakeDevice {
  private func run() {
    while true {
      let seen = bell.value
      let stops = isStopping.load(ordering: .sequentiallyConsistent)
      if stops || !isPaused.load(ordering: .sequentiallyConsistent) {
        let requests = queue.withLock { queue in
          defer { queue = [] }
          return queue
        }
        for request in requests { finish(request, perform(request)) }
        if !requests.isEmpty { continue }
        if stops { return }
      } else {
        flushBroken()
      }
      bell.wait(while: seen, until: .after(milliseconds: 20))
    }
  }

  private func flushBroken() {
    let flushed = queue.withLock { queue in
      let broken = queue.filter { !$0.pair.isReady }
      queue.removeAll { !$0.pair.isReady }
      return broken
    }
    for request in flushed { finish(request, .flushed) }
  }

  private func finish(_ request: WorkRequest, _ status: WorkCompletion.Status) {
    if status != .success { request.pair.fail() }
    completions.append(WorkCompletion(id: request.id, pair: request.pair, status: status))
  }

  private func perform(_ request: WorkRequest) -> WorkCompletion.Status {
    if !request.pair.isReady || isStopping.load(ordering: .relaxed) { return .flushed }
    if !isUp { return .retryExceeded }
    if request.opcode == .write, answersToLose.load(ordering: .acquiring) > 0 {
      answersToLose.wrappingSubtract(1, ordering: .acquiringAndReleasing)
      keepLate(request)
      return .retryExceeded
    }
    return execute(request, isLate: false)
  }

  /// The fabric has its own copy of what it delivers later.
  private func keepLate(_ request: WorkRequest) {
    var copy = request
    copy.local = .allocate(byteCount: request.length, alignment: 16)
    copy.local.copyMemory(from: request.local, byteCount: request.length)
    late.withLock { $0.append(copy) }
  }

  private func execute(_ request: WorkRequest, isLate: Bool) -> WorkCompletion.Status {
    let pair = request.pair
    let address = UInt64(UInt(bitPattern: request.local))
    defer { if isLate { request.local.deallocate() } }
    if !isLate {
      guard table.enterRegion(request.localKey, address, request.length, [], device: index) else {
        return .localProtection
      }
    }
    defer { if !isLate { table.leaveRegion(request.localKey) } }
    guard pair.peer.enterQueuePair(pair.peerNumber) else { return .retryExceeded }
    defer { pair.peer.leaveQueuePair(pair.peerNumber) }
    guard
      pair.peer.enterRegion(
        request.remoteKey, request.remote, request.length, request.opcode.requiredAccess,
        device: pair.peerDevice)
    else {
      // The side that refuses goes into the error state as well.
      pair.peer.breakQueuePair(pair.peerNumber)
      return .remoteAccess
    }
    defer { pair.peer.leaveRegion(request.remoteKey) }
    let status = copy(request, isLate: isLate)
    if status == .remoteOperation || status == .remoteAccess {
      pair.peer.breakQueuePair(pair.peerNumber)
    }
    if status == .success {
      moved.wrappingAdd(UInt64(request.length), ordering: .relaxed)
    }
    return status
  }

  private func copy(_ request: WorkRequest, isLate: Bool) -> WorkCompletion.Status {
    var offset = 0
    while offset < request.length {
      if !isLate, !request.pair.isReady { return .flushed }
      if !request.pair.peer.holds(request.remoteKey) { return .remoteAccess }
      let count = min(Self.pieceBytes, request.length - offset)
      var local = iovec(iov_base: request.local + offset, iov_len: count)
      var remote = iovec(
        iov_base: UnsafeMutableRawPointer(bitPattern: UInt(request.remote) + UInt(offset)),
        iov_len: count)
      let process = request.pair.peer.process
      let result =
        request.opcode == .read
        ? process_vm_readv(process, &local, 1, &remote, 1, 0)
        : process_vm_writev(process, &local, 1, &remote, 1, 0)
      if result > 0 {
        offset += result
      } else if errno == EINTR {
        continue
      } else if errno == EFAULT {
        return isLocalUsable(request, offset) ? .remoteOperation : .localProtection
      } else {
        return .retryExceeded
      }
    }
    return .success
  }

  /// Whether a byte of the local side can be used, after a copy has stopped there.
  private func isLocalUsable(_ request: WorkRequest, _ offset: Int) -> Bool {
    var byte: UInt8 = 0
    return withUnsafeMutablePointer(to: &byte) { byte in
      var here = iovec(iov_base: byte, iov_len: 1)
      var there = iovec(iov_base: request.local + offset, iov_len: 1)
      return request.opcode == .read
        ? process_vm_writev(getpid(), &here, 1, &there, 1, 0) == 1
        : process_vm_readv(getpid(), &here, 1, &there, 1, 0) == 1
    }
  }
}
